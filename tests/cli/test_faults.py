"""Full disks, limits on files, read-only folders: one sentence with the file and the cause, and exit code 1."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from helpers.faults import can_mount, largest_file, read_only_disk, small_disk
from helpers.run import Run
from helpers.tiny import save_run_config
from lightning_drm.cli.main import main
from lightning_drm.training.run_folder import RunFolder

pytestmark = pytest.mark.attacks

MOUNTS = can_mount(Path(tempfile.mkdtemp()) / "disk")  # containers may not: limits and misplaced files remain


def fault(words: list[str], capsys: pytest.CaptureFixture, named: Path | str, cause: str) -> None:
    """Runs a command that must end with one sentence about a file."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(words)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 1, said
    assert said.startswith("lightning-drm: "), said
    assert str(named) in said, said
    assert cause in said, said


def whole(run: Path) -> None:
    """Nothing half-written stayed, under any name."""
    assert not list(run.rglob(".*"))
    for name in run.rglob("*.safetensors"):
        assert name.is_dir() or name.stat().st_size > 8


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_run_config(tmp_path_factory.mktemp("faults"))
    content = yaml.safe_load(path.read_text())
    content["trainer"] |= {"max_steps": 6, "enable_progress_bar": False, "logger": False}
    path.write_text(yaml.safe_dump(content))
    return path


def fit(config: Path, run: Path, *more: str) -> list[str]:
    return ["fit", "--config", str(config), "--drm.dirpath", str(run), *more]


def folder_at(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "something").touch()


def file_at(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


IN_THE_WAY = [
    (folder_at, "config.yaml"),
    (folder_at, "tasks/color/begun.json"),
    (folder_at, "tasks/color/head.safetensors"),
    (folder_at, "tasks/color/deltas.safetensors"),
    (folder_at, "tasks/color/metrics.json"),
    (folder_at, "tasks/color/base_head.safetensors"),
    (folder_at, "report.json"),
    (folder_at, "report.md"),
    (folder_at, "report.png"),
    (file_at, ""),
    (file_at, "tasks"),
    (file_at, "tasks/color"),
    (file_at, "merged"),
]


@pytest.mark.parametrize(("put", "name"), IN_THE_WAY, ids=[f"{put.__name__} {name}" for put, name in IN_THE_WAY])
def test_something_in_the_way(
    config: Path, tmp_path: Path, put: Callable[[Path], None], name: str, capsys: pytest.CaptureFixture
):
    run = tmp_path / "run"
    put(run / name)
    fault(fit(config, run), capsys, run / name, "irectory" if put is folder_at else "file")
    if run.is_dir():
        whole(run)
    shutil.rmtree(run / name) if put is folder_at else (run / name).unlink()
    main(fit(config, run))
    assert (run / "report.png").exists()


LIMITS = [
    ("config.yaml", 500, []),
    ("tasks/color/deltas.safetensors", 20_000, []),
    ("tasks/color/checkpoints/epoch=0-step=6.ckpt", 20_000, ["--trainer.enable_checkpointing", "true"]),
    ("tasks/color/checkpoints/last.ckpt", 20_000, ["--trainer.callbacks", "ModelCheckpoint",
     "--trainer.callbacks.save_last", "true", "--trainer.callbacks.filename", "last",
     "--trainer.enable_checkpointing", "true"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "size", "more"), LIMITS, ids=[name for name, *_ in LIMITS])
def test_a_limit_on_files(
    config: Path, tmp_path: Path, name: str, size: int, more: list[str], capsys: pytest.CaptureFixture
):
    run = tmp_path / "run"
    with largest_file(size):
        fault(fit(config, run, *more), capsys, run / name, "File too large")
    assert not (run / name).exists()
    whole(run)
    main(fit(config, run, *more))
    assert (run / "report.png").exists()


@pytest.mark.parametrize("subcommand", ["fit", "merge"])
def test_the_old_merged_model_stays_when_the_new_one_cannot_be_written(
    copied: Run, subcommand: str, capsys: pytest.CaptureFixture
):
    merged = copied.folder / "merged"
    before = {path: path.read_bytes() for path in merged.rglob("*") if path.is_file()}
    with largest_file(20_000):
        fault([subcommand, *copied.words, "--drm.method", "TIES"], capsys, merged, "File too large")
    assert {path: path.read_bytes() for path in merged.rglob("*") if path.is_file()} == before
    whole(copied.folder)
    main([subcommand, *copied.words, "--drm.method", "TIES"])


def merge_files(files: Path, output: Path, *more: str) -> list[str]:
    models = ["--models.a", str(files / "sst2"), "--models.b", str(files / "rte")]
    return ["merge", "--base", str(files / "base"), *models, "--output", str(output), *more]


@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_a_limit_on_the_files_of_a_merge(files: Path, tmp_path: Path, shards: str, capsys: pytest.CaptureFixture):
    words = merge_files(files, tmp_path / "out", "--max_shard_size", shards)
    with largest_file(10_000):
        fault(words, capsys, tmp_path / ".out.partial", "File too large")
    assert not (tmp_path / "out").exists()
    main(words)
    assert (tmp_path / "out" / "config.json").exists()


def test_a_limit_on_an_adapter(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    adapter = str(files / "adapter")
    words = ["--base", str(files / "base"), "--models.a", adapter, "--models.b", adapter]
    words = ["merge", *words, "--output", str(tmp_path / "out"), "--drm.method", "TaskArithmetic"]
    with largest_file(200):
        fault(words, capsys, tmp_path / ".out.partial" / "adapter_model.safetensors", "File too large")
    assert not (tmp_path / "out").exists()
    main(words)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_file_above_the_output_of_a_merge(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "taken").touch()
    fault(merge_files(files, tmp_path / "taken" / "out"), capsys, tmp_path / "taken", "a file where a folder")


if MOUNTS:

    def test_a_disk_that_is_full_after_the_first_task(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
        main(fit(config, tmp_path / "calm", "--only", "color"))
        used = sum(-(-path.stat().st_size // 4096) * 4096 for path in (tmp_path / "calm").rglob("*") if path.is_file())
        run = tmp_path / "disk" / "run"
        with small_disk(tmp_path / "disk", used + 5 * 4096):
            fault(fit(config, run), capsys, run / "tasks" / "pet", "No space left on device")
            assert RunFolder(run).missing(["color", "pet"]) == ["pet"], "what was finished stays valid"
            whole(run)

    @pytest.mark.parametrize("size", [4096, 8192, 65536])
    def test_a_disk_that_is_full_from_the_start(config: Path, tmp_path: Path, size: int, capsys: pytest.CaptureFixture):
        run = tmp_path / "disk" / "run"
        with small_disk(tmp_path / "disk", size):
            fault(fit(config, run), capsys, run, "No space left on device")
            whole(run)

    def test_the_files_of_a_merge_need_room(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
        with small_disk(tmp_path / "disk", 1 << 20), pytest.raises(SystemExit) as ended:
            main(merge_files(files, tmp_path / "disk" / "out"))
        assert ended.value.code == 2
        assert "out needs 0.0 GB, but its disk has 0.0 GB left" in capsys.readouterr().err

    @pytest.mark.parametrize("subcommand", ["fit", "merge", "test"])
    def test_a_read_only_run_folder(copied: Run, subcommand: str, capsys: pytest.CaptureFixture):
        with read_only_disk(copied.folder):
            fault([subcommand, *copied.words], capsys, copied.folder, "Read-only file system")

    def test_a_read_only_folder_of_checkpoints(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
        kept = tmp_path / "kept"
        kept.mkdir()
        words = ["--trainer.callbacks", "ModelCheckpoint", "--trainer.callbacks.dirpath", str(kept)]
        with read_only_disk(kept):
            words = fit(config, tmp_path / "run", *words, "--trainer.enable_checkpointing", "true")
            fault(words, capsys, kept / "color", "Read-only file system")

    def test_the_output_of_a_merge_on_a_read_only_disk(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
        (tmp_path / "disk").mkdir()
        with read_only_disk(tmp_path / "disk"):
            fault(merge_files(files, tmp_path / "disk" / "out"), capsys, tmp_path / "disk", "Read-only file system")
