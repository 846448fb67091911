"""DRM on the layers of a ViT-B/32 and of an 8-billion-parameter Llama's attention, against the SVD and the floor."""

import pytest
import torch

from benchmarks import published
from benchmarks.floor import Floor
from benchmarks.memory import extra_share
from benchmarks.timing import interleaved, make_deltas
from helpers import reference
from lightning_drm.merging import DRM, TSVM, IsoC, LowRank

BLOCK = {(768, 768): 4, (768, 3072): 1, (3072, 768): 1}  # one ViT-B/32 block: shape -> how many
NUM_TASKS = 8


def relative(actual, expected):
    return float(torch.linalg.norm(actual.double() - expected) / torch.linalg.norm(expected))


@pytest.mark.parametrize("direction", ["horizontal", "vertical"])
@pytest.mark.parametrize("shape", BLOCK, ids="{0[0]}x{0[1]}".format)
def test_vit_layer(compare, shape, direction):
    deltas = make_deltas(shape, NUM_TASKS)
    method = DRM(direction)
    others = {"SVD": lambda: published.drm(deltas, direction), "floor": Floor(deltas, direction)}
    times = compare(f"DRM {direction} {shape}", lambda: method.merge(deltas), others)
    compare.say(f"  products and one `eigh`, the floor of the usual way, × {times['ours'] / times['floor']:.2f}")


@pytest.mark.parametrize("direction", ["horizontal", "vertical"])
def test_vit_block(benchmark, capsys, direction):
    """The sum over one block: what a whole model costs."""
    method, total = DRM(direction), {"ours": 0.0, "SVD": 0.0, "floor": 0.0}
    for shape, count in BLOCK.items():
        deltas = make_deltas(shape, NUM_TASKS)
        runs = {
            "ours": lambda deltas=deltas: method.merge(deltas),
            "SVD": lambda deltas=deltas: published.drm(deltas, direction),
            "floor": Floor(deltas, direction),
        }
        for name, seconds in interleaved(runs, rounds=2).items():
            total[name] += count * seconds
    benchmark.pedantic(lambda: method.merge(make_deltas((768, 768), NUM_TASKS)), rounds=1)
    benchmark.extra_info.update(total)
    with capsys.disabled():
        print(
            f"\n  ViT-B/32 block {direction}: ours {total['ours']:.2f} s, SVD {total['SVD'] / total['ours']:.2f} ×, "
            f"products and `eigh` × {total['ours'] / total['floor']:.2f}"
        )


@pytest.mark.parametrize("direction", ["horizontal", "vertical"])
@pytest.mark.parametrize("size", [768, 1024], ids="{0}x{0}".format)
def test_error(benchmark, capsys, size, direction):
    """Against the float64 SVD, beside what the float32 SVD loses. An entry that equals the threshold may differ."""
    deltas = make_deltas((size, size), NUM_TASKS)
    expected = reference.drm(deltas, None, direction)
    ours = relative(benchmark.pedantic(lambda: DRM(direction).merge(deltas), rounds=1), expected)
    svd = relative(published.drm(deltas, direction), expected)
    benchmark.extra_info.update(error=ours, svd_error=svd)
    with capsys.disabled():
        print(f"\n  error of DRM {direction} {size}: ours {ours:.1e}, float32 SVD {svd:.1e}")


@pytest.mark.parametrize("shape", [(1024, 4096), (4096, 4096)], ids="{0[0]}x{0[1]}".format)
def test_llama_lora(compare, shape):
    """Five adapters of rank 16. The dense SVD of (4096, 20480) takes minutes: it runs once."""
    g = torch.Generator().manual_seed(0)
    deltas = [
        LowRank(torch.randn(shape[0], 16, generator=g) / 64, torch.randn(16, shape[1], generator=g) / 64)
        for _ in range(5)
    ]
    dense = [delta.dense() for delta in deltas]
    compare(
        f"DRM on LoRA {shape}",
        lambda: DRM().merge_low_rank(deltas),
        {"dense SVD": lambda: published.drm(dense)},
        rounds=1,
    )


def test_grid(compare):
    """10 densities × 8 coefficients from one decomposition, against one merge."""
    deltas = make_deltas((768, 3072), NUM_TASKS)

    def grid():
        basis = DRM().prepare(deltas)
        merged = torch.empty_like(deltas[0])
        for density in range(1, 11):
            unscaled = DRM(density=density / 10).merge_prepared(basis).dense()
            for coefficient in range(8, 16):
                torch.mul(unscaled, coefficient / 10, out=merged)

    times = compare("80-point grid", grid, {"one merge": lambda: DRM().merge(deltas)})
    compare.say(f"  the grid takes {times['ours'] / times['one merge']:.2f} merges")


@pytest.mark.parametrize(
    "expression", ["DRM()", "DRM('vertical')", "IsoC()", "IsoCTS()", "TSVM()", "TIES()", "DARETIES()"]
)
def test_memory(benchmark, capsys, expression):
    shares = {shape: extra_share(expression, *shape, NUM_TASKS) for shape in BLOCK}
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info.update({str(shape): share for shape, share in shares.items()})
    with capsys.disabled():
        listed = ", ".join(f"{shape} {share:.2f} ×" for shape, share in shares.items())
        print(f"\n  peak extra memory of {expression}, in stacked inputs: {listed}")


def test_iso_c(compare):
    deltas = make_deltas((768, 3072), NUM_TASKS)
    compare("Iso-C (768, 3072)", lambda: IsoC().merge(deltas), {"SVD": lambda: published.iso_c(deltas)})


def test_tsv_m(compare):
    deltas = make_deltas((768, 768), NUM_TASKS)
    compare("TSV-M (768, 768)", lambda: TSVM().merge(deltas), {"SVDs": lambda: published.tsv_m(deltas)})
