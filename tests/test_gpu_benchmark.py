"""The benchmark on a GPU runs, with matrices so small that no time means anything: the same code on the CPU."""

import csv
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_cases import MODELS, methods_for


def test_it_measures_every_method_and_compares_it_with_the_cpu(
    device: torch.device, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = ["rates", "vitb", "lora", "--shapes", "tiny", "--device", str(device)]
    rows = gpu.main([*arguments, "--output", str(tmp_path / "found.csv")])
    expected = {(key, name) for key in ("vitb", "lora") for name in methods_for(MODELS[key])}
    assert {(row.model, row.method) for row in rows} == expected
    for row in rows:
        assert row.seconds > 0
        assert row.off_the_cpu <= gpu.allowed_off(gpu.method_of(row)), row
        assert (row.extra_gb is None) == (device.type == "cpu")
        assert not row.left_out
    floors = {row.method for row in rows if row.floor_seconds is not None}
    assert floors >= {bound.method for bound in gpu.BOUNDS if bound.model == "vitb"}
    with (tmp_path / "found.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["method"] for row in written] == [row.method for row in rows]
    printed = capsys.readouterr().out
    assert "TFLOP/s" in printed
    assert MODELS["lora"].title in printed


def test_it_says_which_bounds_are_kept():
    rows = [gpu.Row("vitb", "DRM", 0.5, off_the_cpu=1e-6), gpu.Row("vitl", "DRM", 9.0, off_the_cpu=1e-2)]
    kept, broken, *others, values = gpu.verdicts(rows)
    assert kept == "kept: DRM, ViT-B/32 × 8: 0.5 s, at most 1 s"
    assert broken == "NOT kept: DRM, ViT-L/14 × 8: 9 s, at most 4 s"
    assert len(others) == len(gpu.BOUNDS) - 2
    assert all(said.startswith("not measured: ") for said in others)
    assert values == "NOT kept: the values of the CPU, 2 cases, but for DRM on vitl 1e-02"


def test_what_its_time_does_not_reach_is_said():
    model = MODELS["vitb"].tiny()
    rows = list(gpu.measured("vitb", model, gpu.Card(torch.device("cpu")), None, -1.0))
    assert {row.left_out for row in rows} == {"time was up"}
    assert {row.seconds for row in rows} == {None}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["vit"], "there is no part vit; parts: rates, vitb"), (["--device", "cuda"], "--device cpu --shapes tiny")],
)
def test_mistakes(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    if torch.cuda.is_available() and "cuda" in arguments:
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        gpu.main(arguments)
    assert said in capsys.readouterr().err
