"""Every method against the golden outputs of the published code, float64."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_drm.merging import DRM, TIES, TSVM, Average, IsoC, IsoCTS, Method, TaskArithmetic

SHARED = Path(__file__).parents[3] / "shared" / "conformance"
GOLDEN = SHARED if SHARED.is_dir() else Path(__file__).with_name("conformance")
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
    assert torch.linalg.norm(merged - golden[name]) <= 1e-6 * torch.linalg.norm(golden[name])


def test_copy_is_what_was_shared():
    copied = Path(__file__).with_name("conformance")
    for path in GOLDEN.iterdir():
        assert path.read_bytes() == (copied / path.name).read_bytes()
