"""Every method against the golden outputs of the published code, float64."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from helpers import ties
from safetensors.torch import load_file

from lightning_drm.merging import DRM, TIES, TSVM, Average, IsoC, IsoCTS, Method, TaskArithmetic

GOLDEN = Path(__file__).with_name("conformance")
SHA256 = {
    "case_1.safetensors": "bfa7ba794fe43044acd094c50c88ef13eaaf7d34aa7a89e703f8a2b132139d9a",
    "case_2.safetensors": "2755aac583b5e4cf89874417440db76e3f48b5bec649a00bb46d0d90f789ad06",
    "case_3.safetensors": "5c430bfa328cdf7837e9b8cb1825150fea5d156656ba0b35133479be60a36323",
    "case_4.safetensors": "4ea9808caf78c6467c8a84db9d472e0fc6c2c0e40d0661a56c33bd82aca8131d",
    "index.json": "349dc8970be4790f705986463c49b7a5be3c587f62b346131c952346d50d4877",
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
def test_matches_published_code(case, name):
    golden = load_file(GOLDEN / f"{case}.safetensors")
    settings = CASES[case]
    deltas = [golden[f"delta.{task}"] for task in range(settings["num_tasks"])]
    coefficients = settings["coefficients"] if name in WITH_COEFFICIENTS else None
    merged = method(name, settings).merge(deltas, coefficients)
    assert merged.dtype == torch.float64
    expected = ties.settled(merged, golden[name], method(name, settings), deltas)
    assert torch.linalg.norm(merged - expected) <= 1e-6 * torch.linalg.norm(expected)


def test_files_are_those_that_were_shared():
    """Their digests were recorded when they were shared."""
    assert CASES.keys() | {"index"} == {Path(name).stem for name in SHA256}
    for name, digest in SHA256.items():
        assert hashlib.sha256((GOLDEN / name).read_bytes()).hexdigest() == digest, name
