"""Statistics in a run: collected as a fit ends or later, stored, used, and refused where they are missing."""

import copy
import json
from pathlib import Path

import lightning as L
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from helpers.tiny import Vectors, VectorTask, quiet_trainer
from helpers.vectors_run import TASKS, ValidatedTask, VectorsRun
from lightning_drm import DRM, TIES, WUDI, Average, DRMMergeCallback, Fisher, MergeSession, RegMean
from lightning_drm.deltas import STATISTICS_FILE, load_statistics, load_task_vector
from lightning_drm.distributed.ranks import Ranks
from lightning_drm.merging.low_rank import densify
from lightning_drm.training.statistics import SampledLoader

WEIGHTS = ("backbone.0.weight", "backbone.3.weight")


def grams_of(module: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """Gram matrices of the two linear layers of a `VectorTask`, row by row in float64."""
    network = copy.deepcopy(module).double().eval().backbone
    seen = {WEIGHTS[0]: inputs.double()}
    seen[WEIGHTS[1]] = network[:3](seen[WEIGHTS[0]]).detach()
    return {name: sum(torch.outer(row, row) for row in rows) / len(rows) for name, rows in seen.items()}


def regmean(deltas: list[Tensor], grams: list[Tensor], alpha: float = 0.95) -> Tensor:
    shrunk = [alpha * gram.double() + (1 - alpha) * torch.diag(gram.diagonal().double()) for gram in grams]
    met = sum(delta.double() @ gram for delta, gram in zip(deltas, shrunk, strict=True))
    return met @ torch.linalg.inv(sum(shrunk))


@pytest.fixture
def run(tmp_path: Path) -> VectorsRun:
    return VectorsRun(tmp_path / "run")


def fit(run: VectorsRun, method: object, **options: object) -> None:
    L.seed_everything(0)
    run.trainer(method, **options).fit(ValidatedTask(), datamodule=run.data)


def test_a_fit_collects_what_its_method_needs_and_merges_by_it(run: VectorsRun):
    fit(run, RegMean())
    vectors = [load_task_vector(run.folder / "tasks" / task) for task in TASKS]
    for seed, vector in enumerate(vectors):
        assert vector.statistics is not None
        assert vector.statistics.names("gram") == set(WEIGHTS)
        assert vector.statistics.collected["gram"].num_samples == 256, "as asked, though there are 64"
        module = VectorTask()
        for name, delta in vector.deltas.items():
            module.get_parameter(name).data += delta
        for name, expected in grams_of(module, Vectors(seed).train.tensors[0]).items():
            found = vector.statistics.read(name, "gram").gram.double()
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    merged = load_file(run.folder / "merged" / "model.safetensors")
    for name in WEIGHTS:
        grams = [vector.statistics.read(name, "gram").gram for vector in vectors]
        expected = VectorTask().get_parameter(name).double() + regmean([v.deltas[name] for v in vectors], grams)
        torch.testing.assert_close(merged[name].double(), expected.detach(), rtol=1e-5, atol=1e-6)
    assert json.loads((run.folder / "report.json").read_text())["method"]["class_path"] == "lightning_drm.RegMean"


def test_collected_later_they_are_the_same(run: VectorsRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    fit(run, RegMean())
    later = VectorsRun(tmp_path / "later")
    fit(later, DRM())
    with pytest.raises(
        ValueError, match=r"RegMean needs statistics .* there are none of a, b, c: `lightning-drm collect"
    ):
        later.merge(RegMean())
    later.trainer(RegMean()).collect(ValidatedTask(), later.data, only="b")
    capsys.readouterr()
    later.trainer(RegMean()).collect(ValidatedTask(), later.data)
    said = capsys.readouterr().out
    assert "a: statistics (gram) of 256 training samples, in" in said
    assert "b: statistics" not in said, "they are there"
    later.merge(RegMean())
    for task in TASKS:
        one, two = (load_statistics(r.folder / "tasks" / task, _fingerprint(r, task)) for r in (run, later))
        for key, tensor in one.tensors.items():
            torch.testing.assert_close(two.tensors[key], tensor, rtol=1e-6, atol=1e-7)
    one, two = (load_file(r.folder / "merged" / "model.safetensors") for r in (run, later))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-6)


def _fingerprint(run: VectorsRun, task: str) -> str | None:
    return run.trainer().callbacks[0].run_folder.fingerprint(task)


def test_a_fit_of_finished_tasks_collects_what_is_missing(run: VectorsRun, capsys: pytest.CaptureFixture[str]):
    fit(run, DRM())
    before = {task: (run.folder / "tasks" / task / "deltas.safetensors").stat().st_mtime_ns for task in TASKS}
    capsys.readouterr()
    fit(run, WUDI(input_weight=1.0))
    said = capsys.readouterr().out
    assert said.count("not trained again") == said.count("statistics (gram)") == 3
    assert {task: (run.folder / "tasks" / task / "deltas.safetensors").stat().st_mtime_ns for task in TASKS} == before


def test_statistics_change_nothing_in_a_fit(run: VectorsRun, tmp_path: Path):
    """Neither weights nor random numbers: the second and third task come after the first one's statistics."""
    fit(run, DRM(), statistics=["gram", "fisher"])
    plain = VectorsRun(tmp_path / "plain")
    fit(plain, DRM())
    for task in TASKS:
        own, other = (load_task_vector(r.folder / "tasks" / task) for r in (run, plain))
        assert other.statistics is None
        assert own.statistics.names("fisher") == set(own.deltas)
        assert all(torch.equal(own.deltas[name], delta) for name, delta in other.deltas.items())
    run.merge(Fisher())
    run.merge(RegMean())


def test_a_merge_by_other_statistics_puts_the_earlier_one_aside(run: VectorsRun):
    method = WUDI(input_weight=1.0)
    fit(run, method)
    run.merge(method)
    assert not (run.folder / "history").exists(), "it was made the same way"
    fit(run, method, statistics_samples=16)
    (earlier,) = (run.folder / "history").iterdir()
    first, second = (load_file(folder / "merged" / "model.safetensors") for folder in (earlier, run.folder))
    assert any(not torch.equal(first[name], second[name]) for name in WEIGHTS)


def test_a_merge_of_a_version_without_an_argument_counts_as_its_default(run: VectorsRun):
    fit(run, DRM())
    run.merge(TIES())
    record = run.folder / "merged" / "merge.json"
    content = json.loads(record.read_text())
    assert content["method"]["init_args"].pop("space") == "entries"
    record.write_text(json.dumps(content))
    run.test(TIES())
    with pytest.raises(ValueError, match=r"not merged as the configuration says \(init_args\.density: 0\.2 → 0\.3\)"):
        run.test(TIES(density=0.3))


def test_compare_leaves_out_what_has_no_statistics(run: VectorsRun, capsys: pytest.CaptureFixture[str]):
    fit(run, DRM(), statistics=["gram"])
    found = run.compare()
    assert "RegMean" in found
    assert "Fisher" not in found
    assert (
        "Fisher is left out: Fisher needs statistics of every task's training data (fisher)" in capsys.readouterr().out
    )


def test_a_task_that_is_finetuned_again_loses_the_old_statistics(run: VectorsRun):
    fit(run, RegMean())
    old = load_file(run.folder / "tasks" / "a" / STATISTICS_FILE)
    L.seed_everything(0)
    run.trainer(DRM()).fit(ValidatedTask(lr=0.01), datamodule=run.data, retrain=True)
    assert not (run.folder / "tasks" / "a" / STATISTICS_FILE).exists()
    save_file(
        old, run.folder / "tasks" / "a" / STATISTICS_FILE, {"format": "lightning_drm.statistics/2", "deltas": '"x"'}
    )
    assert load_task_vector(run.folder / "tasks" / "a").statistics is None, "they are of other deltas"


def test_those_of_a_version_without_experts_are_collected_again(run: VectorsRun):
    fit(run, RegMean())
    file = run.folder / "tasks" / "a" / STATISTICS_FILE
    with safe_open(file, "pt") as opened:
        said = opened.metadata()
    save_file(load_file(file), file, {**said, "format": "lightning_drm.statistics/1"})
    with pytest.raises(ValueError, match=r"RegMean needs statistics .* there are none of a"):
        run.merge(RegMean())
    fit(run, RegMean())
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["format"] == said["format"]


@pytest.mark.parametrize("deed", ["cut", "bit"])
def test_damaged_statistics_are_refused(run: VectorsRun, deed: str):
    fit(run, RegMean())
    file = run.folder / "tasks" / "a" / STATISTICS_FILE
    content = bytearray(file.read_bytes())
    if deed == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[-3] ^= 4
        file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file} (is damaged|does not hold statistics: it is damaged)"):
        run.merge(RegMean())
    file.unlink()
    fit(run, RegMean())
    assert file.exists(), "collected again, without training"


def test_the_callback_alone_collects_when_a_fit_ends(tmp_path: Path):
    """Without a run folder, statistics wait in memory."""
    merge, modules = DRMMergeCallback(["one", "two"], RegMean(num_samples=32)), []
    for seed, task in enumerate(merge.tasks):
        L.seed_everything(0)
        modules.append(VectorTask())
        quiet_trainer(callbacks=[merge.for_task(task)]).fit(modules[-1], Vectors(seed))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:32]
    grams = [grams_of(m, Vectors(seed).train.tensors[0][order]) for seed, m in enumerate(modules)]
    merged = merge.merged_module.task_module("one")
    for name in WEIGHTS:
        deltas = [(m.get_parameter(name) - VectorTask().get_parameter(name)).detach() for m in modules]
        expected = VectorTask().get_parameter(name).double() + regmean(deltas, [g[name] for g in grams])
        torch.testing.assert_close(merged.get_parameter(name).double(), expected.detach(), rtol=1e-4, atol=1e-6)


def test_of_chosen_weights_the_statistics_are_those_of_the_chosen(tmp_path: Path):
    averaging = L.pytorch.callbacks.EMAWeightAveraging(decay=0.5)
    merge = DRMMergeCallback(["one"], RegMean(), weights="averaged")
    L.seed_everything(0)
    quiet_trainer(callbacks=[merge, averaging]).fit(VectorTask(), Vectors(0))
    vector = merge.task_vectors["one"]
    module = VectorTask()
    for name, delta in vector.deltas.items():
        module.get_parameter(name).data += delta
    for name, expected in grams_of(module, Vectors(0).train.tensors[0]).items():
        torch.testing.assert_close(vector.statistics.read(name, "gram").gram.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_loop_written_by_hand(lora: bool):
    session = MergeSession(["one", "two"], WUDI(input_weight=1.0))
    for seed, task in enumerate(session.tasks):
        module = VectorTask()
        if lora:
            torch.manual_seed(seed)
            inject_adapter_in_model(LoraConfig(target_modules=["0", "3"], r=2), module.backbone)
        session.note_base(module)
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
        for x, y in Vectors(seed).train_dataloader():
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x), y).backward()
            optimizer.step()
        with pytest.raises(ValueError, match="was not collected yet"):
            session.collect_statistics(module, task, [])
        session.collect(module, task)
        session.collect_statistics(module, task, Vectors(seed).train_dataloader(), num_samples=40)
        assert session.task_vectors[task].statistics.collected["gram"].num_samples == 40
    merged = session.fuse().task_module("two")
    vectors = session.task_vectors.values()
    for name in WEIGHTS:
        deltas = [densify(vector.deltas[name]).double() for vector in vectors]
        grams = [vector.statistics.read(name, "gram").gram.double() for vector in vectors]
        joined = [d.T @ d / d.square().sum() + g / g.trace() for d, g in zip(deltas, grams, strict=True)]
        ridge = 0.1 * sum(joined).trace() / len(sum(joined)) * torch.eye(len(sum(joined)))
        met = sum(d @ (g + ridge) for d, g in zip(deltas, joined, strict=True))
        expected = VectorTask().get_parameter(name).double() + met @ torch.linalg.inv(sum(joined) + ridge)
        torch.testing.assert_close(merged.get_parameter(name).double(), expected.detach(), rtol=1e-4, atol=1e-6)


def test_without_statistics_a_session_does_not_merge_by_them():
    session = MergeSession(["one"], RegMean())
    module = VectorTask()
    session.note_base(module)
    session.collect(module, "one")
    with pytest.raises(ValueError, match=r"RegMean needs statistics .* none of one: .* MergeSession.collect_stat"):
        session.fuse()


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(20))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_share_the_same_samples(size: int):
    loaders = [DataLoader(torch.arange(20), 3, shuffle=True) for _ in range(size)]
    parts = [list(SampledLoader(loader, 10, Ranks(rank, size))) for rank, loader in enumerate(loaders)]
    seen = torch.cat([batch for part in parts for batch in part])
    expected = torch.randperm(20, generator=torch.Generator().manual_seed(0))[:10]
    assert sorted(seen.tolist()) == sorted(expected.tolist())
    streams = [list(SampledLoader(DataLoader(Stream(), 3), 10, Ranks(rank, size))) for rank in range(size)]
    assert sorted(torch.cat([b for part in streams for b in part]).tolist()) == list(range(12)), "whole batches"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"statistics": ["grams"], "statistics_samples": 0},
            "of gram, fisher, got 'grams'; statistics_samples must be 1",
        ),
        (
            {"method": RegMean(), "statistics_samples": 8},
            "statistics_samples is 8, but RegMean asks for .* 256 samples",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict, said: str):
    with pytest.raises(ValueError, match=said):
        DRMMergeCallback(["a"], **settings)


def test_nothing_to_collect_is_said(run: VectorsRun):
    with pytest.raises(
        ValueError, match=r"nothing to collect: Average needs no statistics, and drm\.statistics names none"
    ):
        run.trainer(Average()).collect(ValidatedTask(), run.data)
    with pytest.raises(ValueError, match=r"has no finetune of a, b, c: run `fit` first"):
        run.trainer(RegMean()).collect(ValidatedTask(), run.data)


def test_tune_searches_what_has_statistics(run: VectorsRun):
    fit(run, DRM(), statistics=["gram"])
    with pytest.raises(ValueError, match=r"Fisher needs statistics of every task's training data \(fisher\)"):
        run.trainer().tune(ValidatedTask(), run.data, methods=["RegMean", "Fisher"])
    run.trainer().tune(ValidatedTask(), run.data, methods=["RegMean"], grid={"RegMean": {"alpha": [0.1, 0.9]}})
    assert run.report()["tuned"]["class_path"] == "lightning_drm.RegMean"
