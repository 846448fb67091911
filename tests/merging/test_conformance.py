"""Every method against the golden outputs of the published code, float64."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import ties
from helpers.devices import on
from lightning_drm.merging import (
    DRM,
    STAR,
    SVC,
    TIES,
    TSVM,
    WUDI,
    Average,
    DCMerge,
    Fisher,
    IsoC,
    IsoCTS,
    KnOTS,
    LowRank,
    Method,
    RegMean,
    Statistics,
    TaskArithmetic,
)
from lightning_drm.merging.core_space import CoreSpace

GOLDEN = Path(__file__).with_name("conformance")
SHA256 = {
    "case_1.safetensors": "bfa7ba794fe43044acd094c50c88ef13eaaf7d34aa7a89e703f8a2b132139d9a",
    "case_2.safetensors": "2755aac583b5e4cf89874417440db76e3f48b5bec649a00bb46d0d90f789ad06",
    "case_3.safetensors": "5c430bfa328cdf7837e9b8cb1825150fea5d156656ba0b35133479be60a36323",
    "case_4.safetensors": "4ea9808caf78c6467c8a84db9d472e0fc6c2c0e40d0661a56c33bd82aca8131d",
    "index.json": "349dc8970be4790f705986463c49b7a5be3c587f62b346131c952346d50d4877",
    "case_201.safetensors": "eda558622fdaa5f339bf78feaa5a60b59dfe56a76886c90b7656ad10eb3bad9c",
    "case_202.safetensors": "b43c22b04e4ef535820b4cc1c9bd4824896cc7d46a0304ccf38d65f5dde439f0",
    "case_203.safetensors": "3389cbce2eb46b9baf9013d8dc5a34b959a91509702a6a3a26f8c117d6de7e4d",
    "case_204.safetensors": "23ae27d559f68cec125bc968d56f83e36c4690c0388b20188736864e721c8fef",
    "index_2.json": "183df6a921b8e462d8d1b089746b998f859ea9c2f7dabd699d455d3c4404cc81",
}
CASES = json.loads((GOLDEN / "index.json").read_text())
METHODS = ["drm_h", "drm_v", "ties", "task_arithmetic", "average", "iso_c", "iso_cts", "tsv_m"]
WITH_COEFFICIENTS = {"drm_h", "drm_v"}  # the published code of the others has no coefficient per task


def method(name: str, case: dict) -> Method:
    return {
        "drm_h": DRM(density=case["density"], rank_tol=case["drm_rank_tol"]),
        "drm_v": DRM("vertical", density=case["density"], rank_tol=case["drm_rank_tol"]),
        "ties": TIES(case["density"], scope="tensor"),
        "task_arithmetic": TaskArithmetic(case["task_arithmetic_lambda"]),
        "average": Average(),
        "iso_c": IsoC(),
        "iso_cts": IsoCTS(case["iso_common_fraction"]),
        "tsv_m": TSVM(),
    }[name]


# Of rank-deficient deltas (case_4) there is no golden output of the spectral methods: the published code fills them up
# with arbitrary null vectors.
OUTPUTS = [(case, name) for case in CASES for name in METHODS if name in load_file(GOLDEN / f"{case}.safetensors")]


def test_outputs_are_complete():
    assert {(case, name) for case in CASES for name in METHODS} - set(OUTPUTS) == {
        ("case_4", "iso_c"),
        ("case_4", "iso_cts"),
        ("case_4", "tsv_m"),
    }


@pytest.mark.parametrize(("case", "name"), OUTPUTS)
def test_matches_published_code(case, name, device):
    golden = load_file(GOLDEN / f"{case}.safetensors")
    settings = CASES[case]
    deltas = [golden[f"delta.{task}"] for task in range(settings["num_tasks"])]
    coefficients = settings["coefficients"] if name in WITH_COEFFICIENTS else None
    merged = method(name, settings).merge(on(device, deltas), coefficients)
    assert merged.device.type == device.type
    merged = merged.cpu()
    assert merged.dtype == torch.float64
    expected = ties.settled(merged, golden[name], method(name, settings), deltas)
    assert torch.linalg.norm(merged - expected) <= 1e-6 * torch.linalg.norm(expected)


def test_files_are_those_that_were_shared():
    """Their digests were recorded when they were shared."""
    assert SHA256.keys() == {path.name for path in GOLDEN.iterdir()}
    for name, digest in SHA256.items():
        assert hashlib.sha256((GOLDEN / name).read_bytes()).hexdigest() == digest, name


# Of deltas of low rank (case_203) there is no golden output of DC-Merge for full finetuning: the published code fills
# them up with null vectors.
LATER = json.loads((GOLDEN / "index_2.json").read_text())
LATER_METHODS = {
    "regmean": lambda case: RegMean(case["regmean_alpha"]),
    "regmean_weighted": lambda case: RegMean(case["regmean_alpha"]),
    "fisher_max": lambda case: Fisher(case["fisher_floor"]),
    "wudi": lambda case: WUDI(ridge=0.0),
    "star": lambda case: STAR(case["star_eta"]),
    "svc": lambda case: SVC(TaskArithmetic(case["task_arithmetic_lambda"]), case["svc_alpha"]),
    "knots_ties": lambda case: KnOTS(case["ties_keep"]),
    "knots_ties_unscaled": lambda case: KnOTS(case["ties_keep"], scaled=False),
    "dc_merge": lambda case: DCMerge(case["dc_density"]),
    "dc_merge_published_density": lambda case: DCMerge(),
    "dc_merge_lora_avg": lambda case: DCMerge(case["dc_density"], case["dc_rank"], "average"),
    "dc_merge_lora_linear": lambda case: DCMerge(case["dc_density"], case["dc_rank"], "linear", case["dc_rho"]),
}
LATER_OUTPUTS = [
    (case, name) for case, settings in LATER.items() for name in LATER_METHODS if name in settings.get("outputs", ())
]


def test_later_outputs_are_complete():
    without = {("case_203", "dc_merge"), ("case_203", "dc_merge_published_density")}
    cases = [case for case, settings in LATER.items() if settings["kind"] == "matrix"]
    assert {(case, name) for case in cases for name in LATER_METHODS} - set(LATER_OUTPUTS) == without


@pytest.mark.parametrize(("case", "name"), LATER_OUTPUTS)
def test_matches_later_published_code(case, name, device):
    golden, settings = load_file(GOLDEN / f"{case}.safetensors"), LATER[case]
    tasks = range(settings["num_tasks"])
    deltas = [golden[f"delta.{task}"] for task in tasks]
    method, expected = LATER_METHODS[name](settings), golden[name]
    coefficients = settings["coefficients"] if name in ("regmean_weighted", "fisher_max") else None
    statistics = [Statistics(golden[f"gram.{task}"], golden[f"fisher.{task}"]).to(device) for task in tasks]
    merged = method.merge(on(device, deltas), coefficients, statistics=statistics).cpu()
    assert torch.linalg.norm(merged - expected) <= 1e-6 * torch.linalg.norm(expected)
    if settings["rank"] is not None and method.supports_low_rank:
        factors = [LowRank(golden[f"lora_up.{task}"], golden[f"lora_down.{task}"]) for task in tasks]
        merged = method.merge_low_rank(on(device, factors), coefficients, statistics=statistics).dense().cpu()
        assert torch.linalg.norm(merged - expected) <= 1e-6 * torch.linalg.norm(expected)


def test_matches_published_ties_in_core_space(device):
    """Of the factors as they were trained; that `TIES` balances them first is this package's own."""
    golden, settings = load_file(GOLDEN / "case_203.safetensors"), LATER["case_203"]
    factors = [LowRank(golden[f"lora_up.{task}"], golden[f"lora_down.{task}"]) for task in range(3)]
    space = CoreSpace.of_factors(on(device, factors))
    merged = space.delta(TIES(settings["ties_keep"], "tensor").merge(space.cores)).dense().cpu()
    assert torch.linalg.norm(merged - golden["core_ties"]) <= 1e-12 * torch.linalg.norm(golden["core_ties"])
