"""LiNeS over whole models: depths by name, and every parameter against plain loops over a state dict in float64."""

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor

from helpers import reference
from lightning_drm.deltas import Kind, TaskVector
from lightning_drm.fusion import Decompositions, Fusion, Override, Recipe, merge_side_by_side
from lightning_drm.fusion.blocks import depths, towers
from lightning_drm.fusion.depth import notes_on_depth, problems_of_depth
from lightning_drm.merging import DARETIES, DRM, SVC, TIES, Delta, LiNeS, LowRank, Method, TaskArithmetic

# Two towers of several blocks, and what is in none; by name, the shape and how deep it lies. The last block of the
# encoder is frozen, and counts.
MODEL: dict[str, tuple[tuple[int, ...], float]] = {
    "embed.weight": ((10, 6), 0.0),
    **{f"encoder.layer.{n}.fc.weight": ((6, 8), n / 4) for n in range(4)},
    **{f"encoder.layer.{n}.fc.bias": ((8,), n / 4) for n in range(4)},
    **{f"decoder.layer.{n}.fc.weight": ((7, 6), n / 1) for n in range(2)},
    "norm.weight": ((6,), 0.0),
    "pool.0.weight": ((6, 6), 0.0),
}
BASE = dict.fromkeys([*MODEL, "encoder.layer.4.fc.weight", "encoder.layer.4.fc.bias"], "same")
IN_ORDER = [0.7, 1.3, 1.0]
TASKS = ["a", "b", "c"]
Merge = Callable[[list[Tensor]], Tensor]


def kind_of(name: str) -> Kind:
    if name == "embed.weight":
        return "embedding"
    return "matrix" if len(MODEL[name][0]) == 2 else "other"


def vectors_of(tasks: Sequence[str], *, lora: bool = False) -> list[TaskVector]:
    generator = torch.Generator().manual_seed(3)

    def delta(name: str) -> Delta:
        shape = MODEL[name][0]
        if lora and kind_of(name) == "matrix":
            up, down = (torch.randn(*part, generator=generator).double() for part in ((shape[0], 2), (2, shape[1])))
            return LowRank(up, down)
        return torch.randn(shape, generator=generator).double()

    names = [name for name in MODEL if not lora or kind_of(name) == "matrix"]
    kinds = {name: kind_of(name) for name in names}
    return [TaskVector(task, {name: delta(name) for name in names}, kinds, {}, BASE) for task in tasks]


def plain(
    vectors: Sequence[TaskVector],
    method: Merge,
    rest: Merge,
    coefficients: Sequence[float],
    alpha: float | None,
    beta: float,
    keep: Sequence[str] = (),
) -> dict[str, Tensor]:
    """The paper's steps over a whole state dict, one after the other: merge, alpha from the norms, scale."""
    deltas = {
        name: [d.up @ d.down if isinstance(d, LowRank) else d for d in (vector.deltas[name] for vector in vectors)]
        for name in vectors[0].deltas
    }
    merged = {name: (method if kind_of(name) == "matrix" else rest)(each) for name, each in deltas.items()}
    if alpha is None:
        summed_entries = merged_entries = 0.0
        for name, each in deltas.items():
            if name not in keep:
                total = sum(c * delta for c, delta in zip(coefficients, each, strict=True))
                summed_entries += sum(abs(entry) for entry in total.flatten().tolist())
                merged_entries += sum(abs(entry) for entry in merged[name].flatten().tolist())
        alpha = summed_entries / merged_entries / len(vectors)
    return {
        name: 0 * delta if name in keep else (alpha + beta * MODEL[name][1]) * delta for name, delta in merged.items()
    }


def weighted(coefficients: Sequence[float], scale: float) -> Merge:
    return lambda each: scale * sum(c * delta for c, delta in zip(coefficients, each, strict=True))


INNER: dict[str, tuple[Method, Merge, Merge]] = {
    "task_arithmetic": (TaskArithmetic(1.0), weighted(IN_ORDER, 1.0), weighted(IN_ORDER, 1.0)),
    "scaled": (TaskArithmetic(0.4), weighted(IN_ORDER, 0.4), weighted(IN_ORDER, 0.4)),
    "drm": (DRM(density=0.4), lambda d: reference.drm(d, IN_ORDER, density=0.4), weighted(IN_ORDER, 1 / 3)),
    "svc": (
        SVC(TaskArithmetic(1.0)),
        lambda d: reference.svc(d, reference.task_arithmetic(d, IN_ORDER, scale=1.0), IN_ORDER),
        weighted(IN_ORDER, 1 / 3),
    ),
}
NUMBERS = {"auto": {}, "given": {"alpha": 0.3, "beta": 0.7}, "beta": {"beta": 0.2}, "alpha": {"alpha": 0.4}}


def recipe_of(method: Method, numbers: Mapping[str, float], **other: object) -> Recipe:
    return Recipe(LiNeS(method, **numbers), dict(zip(TASKS, IN_ORDER, strict=True)), **other)


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], rtol: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=rtol, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("inner", INNER)
def test_a_plain_loop_over_the_state_dict(inner: str, lora: bool, numbers: str, device: torch.device):
    method, merge, rest = INNER[inner]
    vectors, given = vectors_of(TASKS, lora=lora), NUMBERS[numbers]
    expected = plain(vectors, merge, rest, IN_ORDER, given.get("alpha"), given.get("beta", 0.5))
    merged = {name: tensor.cpu() for name, tensor in Fusion(recipe_of(method, given), vectors, device)}
    assert_same(merged, expected)


@pytest.mark.parametrize("inner", ["task_arithmetic", "drm", "svc"])
def test_adapters_stay_factors(inner: str):
    method, merge, rest = INNER[inner]
    vectors = vectors_of(TASKS, lora=True)
    found = {name: low for name, low, _ in Fusion(recipe_of(method, {}), vectors).merge_low_rank(vectors[0].deltas)}
    assert all(isinstance(delta, LowRank) and delta.rank <= 6 for delta in found.values())
    expected = plain(vectors, merge, rest, IN_ORDER, None, 0.5)
    assert_same({name: delta.dense() for name, delta in found.items()}, expected, rtol=1e-9)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_one_task_keeps_its_last_block(alpha: float):
    (vector,) = vectors_of(["a"])
    merged = dict(Fusion(Recipe(LiNeS(TaskArithmetic(1.0), alpha)), [vector]))
    assert_same(merged, plain([vector], weighted([1.0], 1.0), weighted([1.0], 1.0), [1.0], alpha, 1 - alpha))
    torch.testing.assert_close(merged["decoder.layer.1.fc.weight"], vector.deltas["decoder.layer.1.fc.weight"])


def test_the_sum_of_several_tasks_becomes_their_mean_where_it_is_shallow():
    vectors = vectors_of(TASKS)
    merged = dict(Fusion(Recipe(LiNeS(TaskArithmetic(1.0), beta=0.4)), vectors))
    for name in ("embed.weight", "norm.weight", "pool.0.weight", "encoder.layer.0.fc.bias"):
        torch.testing.assert_close(merged[name], sum(vector.deltas[name] for vector in vectors) / 3)


def test_what_keeps_the_base_is_in_no_norm():
    keep = ["embed.weight", "encoder.layer.2.fc.weight", "encoder.layer.2.fc.bias"]
    overrides = [Override("embed*", rule="base"), Override("*layer.2.*", rule="base")]
    method, merge, rest = INNER["drm"]
    vectors = vectors_of(TASKS)
    merged = dict(Fusion(recipe_of(method, {}, overrides=overrides), vectors))
    assert_same({n: t.double() for n, t in merged.items()}, plain(vectors, merge, rest, IN_ORDER, None, 0.5, keep))
    nothing = dict(Fusion(recipe_of(method, {}, overrides=[Override("*", rule="base")]), vectors))
    assert not any(tensor.any() for tensor in nothing.values())


def test_density_split_and_rules_are_those_of_the_method_inside():
    overrides = [
        Override("*layer.1.fc.weight", density=0.8),
        Override("encoder.layer.0.fc.weight", split=2),
        Override("*bias", rule="elect"),
    ]
    vectors = vectors_of(TASKS)
    inner = recipe_of(DRM(density=0.4), {}, overrides=overrides)
    whole = dict(Fusion(Recipe(DRM(density=0.4), inner.coefficients, overrides=overrides[::2]), vectors))
    unscaled = dict(Fusion(Recipe(DRM(density=0.4), inner.coefficients, overrides=overrides), vectors))
    assert not torch.equal(unscaled["encoder.layer.0.fc.weight"], whole["encoder.layer.0.fc.weight"])
    pairs = list(zip(IN_ORDER, vectors, strict=True))
    alpha = sum(float(sum(c * vector.deltas[name] for c, vector in pairs).abs().sum()) for name in MODEL)
    alpha /= 3 * sum(float(tensor.abs().sum()) for tensor in unscaled.values())
    expected = {name: (alpha + 0.5 * MODEL[name][1]) * tensor for name, tensor in unscaled.items()}
    assert_same(dict(Fusion(inner, vectors)), expected)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("method", [TaskArithmetic(1.0), TIES(0.3), DARETIES(0.5)], ids=repr)
def test_pieces_in_threads(method: Method):
    """The method inside is calibrated, and draws, as it does without LiNeS."""
    generator = torch.Generator().manual_seed(0)
    shapes = {f"layer.{n}.weight": (90, 11) for n in range(3)} | {"norm": (5,)}
    vectors = [
        TaskVector(
            task,
            {name: torch.randn(shape, generator=generator).double() for name, shape in shapes.items()},
            {name: "matrix" if "layer" in name else "other" for name in shapes},
            {},
            {},
        )
        for task in TASKS
    ]
    inner = dict(Fusion(Recipe(method), vectors))
    alpha = sum(float(sum(vector.deltas[name] for vector in vectors).abs().sum()) for name in shapes)
    alpha /= 3 * sum(float(tensor.abs().sum()) for tensor in inner.values())
    fusion = Fusion(Recipe(LiNeS(method, beta=0.8)), vectors, shapes=shapes, in_pieces=frozenset(shapes))
    fusion.calibrate()
    for name in shapes:
        parts = [merged.delta for merged in fusion.merge_in_pieces(name)]
        assert len(parts) == (5 if "layer" in name else 1)
        depth = int(name.split(".")[1]) / 2 if "layer" in name else 0.0
        torch.testing.assert_close(torch.cat(parts), (alpha + 0.8 * depth) * inner[name], rtol=1e-12, atol=0)


def test_ranks_that_merge_a_share_each_find_the_same_alpha():
    """First each share's sums are seen, then every share gets all of them; one rank has no parameter."""
    vectors, recipe, names = vectors_of(TASKS), recipe_of(DRM(density=0.4), {}), list(MODEL)
    shares = [set(names[::2]), set(names[1::2]), set()]
    sums: list[Tensor] = []

    def see(tensor: Tensor) -> Tensor:
        sums.append(tensor.clone())
        return tensor + 1

    for share in shares:
        Fusion(recipe, vectors, share=share, reduce=see).calibrate()
    fusions = [Fusion(recipe, vectors, share=share, reduce=lambda _: sum(sums)) for share in shares]
    together = {merged.name: merged.delta for n, fusion in enumerate(fusions) for merged in fusion.merge(shares[n])}
    alone = Fusion(recipe, vectors)
    expected = dict(alone)
    assert all(fusion.lines == alone.lines for fusion in fusions)
    assert together.keys() == expected.keys()
    assert all(torch.equal(together[name], delta) for name, delta in expected.items())


def test_side_by_side_and_with_kept_decompositions():
    vectors = vectors_of(TASKS)
    recipes = [recipe_of(DRM(density=0.4), {"beta": beta}) for beta in (0.2, 0.9)] + [Recipe(DRM(density=0.4))]
    alone = [dict(Fusion(recipe, vectors)) for recipe in recipes]
    with Decompositions() as kept:
        fusions = [Fusion(recipe, vectors, decompositions=kept) for recipe in recipes]
        for name, merged in merge_side_by_side(fusions):
            for ours, theirs in zip(merged, alone, strict=True):
                torch.testing.assert_close(ours, theirs[name], rtol=1e-10, atol=1e-12)
        assert kept.num_decomposed == sum(kind_of(name) == "matrix" for name in MODEL), "once for all passes"
        assert len(kept.norms) == 1, "both betas have the alpha of one pass"
    assert not kept.norms


def test_half_precision_is_scaled_in_float32():
    vectors = [
        TaskVector(v.task, {n: d.bfloat16() for n, d in v.deltas.items()}, v.kinds, {}, v.base_hashes)
        for v in vectors_of(TASKS)
    ]
    doubled = [
        TaskVector(v.task, {n: d.double() for n, d in v.deltas.items()}, v.kinds, {}, v.base_hashes) for v in vectors
    ]
    expected = plain(doubled, weighted(IN_ORDER, 1.0), weighted(IN_ORDER, 1.0), IN_ORDER, None, 0.5)
    for name, delta in Fusion(recipe_of(TaskArithmetic(1.0), {}), vectors):
        assert delta.dtype == torch.float32
        torch.testing.assert_close(delta.double(), expected[name], rtol=2e-6, atol=2e-6)


def test_a_factor_beyond_the_precision_is_refused_by_name():
    vectors = [
        TaskVector(v.task, {n: d.float() for n, d in v.deltas.items()}, v.kinds, {}, v.base_hashes)
        for v in vectors_of(TASKS)
    ]
    with pytest.raises(ValueError, match=r"^encoder\.layer\.1\.fc\.weight: LiNeS: the merged delta has entries beyond"):
        dict(Fusion(recipe_of(TaskArithmetic(1.0), {"alpha": 1.0, "beta": 1e39}), vectors))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["bert.encoder.layer.10.x.weight", "bert.encoder.layer.9.x.weight"], [["9", "10"]]),
        (["h.0.attn.weight", "h.0.mlp.experts.7.weight", "h.1.attn.weight"], [["0", "1"]]),
        (["encoder.block.0.layer.1.w", "encoder.block.1.layer.0.w", "decoder.block.0.layer.0.w"], [["0", "1"]]),
        (["layer1.0.conv1.weight", "layer2.0.conv1.weight", "layer1.1.conv1.weight", "layer10.0.w", "conv1.weight"],
         [["layer1.0", "layer1.1", "layer2.0", "layer10.0"]]),
        (["embed.weight", "fc1.weight", "fc2.weight", "pool.0.weight"], []),
    ],
)  # fmt: skip
def test_towers(names: list[str], expected: list[list[str]]):
    found = towers(names)
    assert [len(tower) for tower in found] == [len(tower) for tower in expected]
    for tower, ends in zip(found, expected, strict=True):
        assert all(block == end or block.endswith(f".{end}") for block, end in zip(tower, ends, strict=True))


def test_towers_have_depths_of_their_own():
    names = [f"vision.layers.{n}.w" for n in range(5)] + [f"text.layers.{n}.w" for n in range(3)]
    found = depths(names)
    assert [found[f"vision.layers.{n}"] for n in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert [found[f"text.layers.{n}"] for n in range(3)] == [0, 0.5, 1]


def test_a_model_without_blocks_is_refused():
    vectors = [TaskVector(task, {"fc.weight": torch.ones(2, 2)}, {"fc.weight": "matrix"}, {}, {}) for task in TASKS]
    assert problems_of_depth(DRM(), ["fc.weight"]) == []
    with pytest.raises(ValueError, match=r"numbers in the parameters' names tell, .* has none: .* fc\.weight"):
        Fusion(Recipe(LiNeS(DRM())), vectors)


def test_what_names_mean_is_said():
    method = LiNeS(DRM())
    assert notes_on_depth(method, BASE, MODEL) == [
        "LiNeS: the depth goes from encoder.layer.0 to encoder.layer.4 (5 blocks), and from decoder.layer.0 "
        "to decoder.layer.1 (2 blocks); 3 parameters are in no block."
    ]
    assert notes_on_depth(method, BASE, ["norm.weight"]) == [
        "LiNeS: no parameter that is merged is in a block, so all are scaled alike."
    ]
    assert notes_on_depth(DRM(), BASE, MODEL) == []
    fusion = Fusion(Recipe(LiNeS(TaskArithmetic(1.0))), vectors_of(TASKS))
    assert fusion.notes == ["LiNeS: alpha is 0.3333, beta is 0.5."]
    assert Fusion(Recipe(DRM()), vectors_of(TASKS)).notes == []
