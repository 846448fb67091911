"""LoRA on a base that bitsandbytes has quantized: exact deltas, and a merged adapter that peft loads on that base."""

import copy
import json
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from helpers.tiny import QUIET, quiet_trainer
from helpers.tiny_language import NUMBERS, PETS, save_counting, save_tiny_llama
from lightning_drm import (
    DRM,
    TIES,
    Average,
    DRMMergeCallback,
    Fisher,
    MergeSession,
    MergeTrainer,
    MultiTaskDataModule,
    RegMean,
    TransformerTask,
    load_merged,
)
from lightning_drm.data import LanguageTask
from lightning_drm.deltas import backbone_parameters, load_task_vector, quantized_layers
from lightning_drm.deltas.hashed_file import FACTORS
from lightning_drm.deltas.quantized import keep_as_stored
from lightning_drm.training.strategies import refuse_quantized

bitsandbytes = pytest.importorskip("bitsandbytes")

WAYS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
ADAPTERS = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
TEXTS = {"number": NUMBERS, "pet": PETS}
UP, DOWN = FACTORS  # endings of names in a file


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("base") / "llama")


def quantized_model(base: str, way: str = "nf4", **settings: object) -> nn.Module:
    config = BitsAndBytesConfig(**WAYS[way], **settings)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
    keep_as_stored(model)
    return model


def texts(folder: Path, base: str) -> MultiTaskDataModule:
    files = {name: save_counting(folder / f"{name}.csv", words, 0) for name, words in TEXTS.items()}
    return MultiTaskDataModule(
        {name: LanguageTask(file, base, prompt_column="prompt", batch_size=16) for name, file in files.items()}
    )


def merged_delta(folder: Path, run: Path, method: object) -> None:
    """The adapter's product against a plain merge of the stored factors' products, in doubles."""
    vectors = [load_file(run / "tasks" / task / "deltas.safetensors") for task in TEXTS]
    written = load_file(folder / "adapter_model.safetensors")
    layers = {name.removesuffix(".lora_A.weight") for name in written if ".lora_A" in name}
    assert len(layers) == 3
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]
    for layer in layers:
        own = layer.removeprefix("base_model.model.")
        (name,) = {key.removesuffix(UP) for key in vectors[0] if key.endswith(f"{own}.weight{UP}")}
        dense = [vector[name + UP].double() @ vector[name + DOWN].double() for vector in vectors]
        assert all(float(delta.abs().max()) > 1e-3 for delta in dense), "the case shows nothing"
        product = written[f"{layer}.lora_B.weight"].double() @ written[f"{layer}.lora_A.weight"].double()
        torch.testing.assert_close(product, method.merge(dense), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_run_of_transformer_tasks(way: str, base: str, tmp_path: Path):
    data, run = texts(tmp_path, base), tmp_path / "run"
    method = DRM(density=0.5)

    def template() -> TransformerTask:
        optimizer = partial(torch.optim.AdamW, lr=1e-2)
        return TransformerTask(
            base, lora=ADAPTERS, optimizer=optimizer, quantization=WAYS[way], gradient_checkpointing=True
        )

    def trainer() -> MergeTrainer:
        merge = DRMMergeCallback(data.task_names, method, run, statistics=["gram"])
        return MergeTrainer(callbacks=[merge], max_steps=30, limit_val_batches=0, **QUIET)

    L.seed_everything(0)
    trainer().fit(template(), datamodule=data)
    report = json.loads((run / "report.json").read_text())
    individual, start = report["scores"]["individual"], report["scores"]["base"]
    assert all(individual[task] < start[task] for task in TEXTS), "a lower perplexity: they have learned"
    merged_delta(run / "merged", run, method)
    trainer().merge(template(), datamodule=data)
    trainer().test(template(), datamodule=data)
    again = json.loads((run / "report.json").read_text())["scores"]
    for row, scores in report["scores"].items():
        assert {task: again[row][task] for task in TEXTS} == pytest.approx({task: scores[task] for task in TEXTS}), row

    model = PeftModel.from_pretrained(quantized_model(base, way), run / "merged").eval()
    with pytest.raises(ValueError, match=r"is an adapter on 'llama', which is not at hand under this name"):
        load_merged(run / "merged", "pet")
    ours = load_merged(run / "merged", "pet", configured(template(), data.tasks["pet"]))
    batch = next(iter(data.tasks["pet"].test_dataloader()))
    with torch.no_grad():
        theirs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        mine = ours.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    scores = perplexity(model, data.tasks["pet"])
    assert report["scores"]["merged"]["pet"] == pytest.approx(scores, rel=1e-4)


def configured(module: TransformerTask, data: LanguageTask) -> TransformerTask:
    module.configure_for(data)
    return module


def perplexity(model: nn.Module, data: LanguageTask) -> float:
    """Of all tokens of the test set, in doubles."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in data.test_dataloader():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
            labels = batch["labels"][:, 1:]
            losses = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none")
            total, count = total + float(losses[labels != -100].sum()), count + int((labels != -100).sum())
    return float(torch.tensor(total / count).exp())


class Counting(L.LightningModule):
    """A user's own module: a quantized Llama under a peft model, judged by its loss."""

    head_names = ()
    score = "loss"
    higher_is_better = False

    def __init__(self, base: str, way: str = "nf4", adapters: LoraConfig | None = ADAPTERS) -> None:
        super().__init__()
        model = quantized_model(base, way)
        self.model = get_peft_model(model, copy.deepcopy(adapters)) if adapters is not None else model

    def loss(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, labels=ids).loss

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class Sequences(L.LightningDataModule):
    """Tokens in one of two orders."""

    def __init__(self, step: int) -> None:
        super().__init__()
        starts = torch.arange(64) % 10
        self.rows = 4 + (starts[:, None] + step * torch.arange(8)) % 10

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.rows[:48], batch_size=8, shuffle=True)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.rows[48:], batch_size=8)


@pytest.mark.parametrize("way", WAYS)
def test_a_module_of_ones_own(way: str, base: str, tmp_path: Path):
    merge = DRMMergeCallback(list(TEXTS), RegMean(), tmp_path, statistics=["gram"])
    data = {task: Sequences(step) for task, step in zip(TEXTS, (1, 3), strict=True)}
    kept = {}
    for task in TEXTS:
        L.seed_everything(0)
        kept[task] = Counting(base, way)
        quiet_trainer(callbacks=[merge.for_task(task)], max_epochs=4).fit(kept[task], data[task])
    for task, vector in merge.task_vectors.items():
        parameters = backbone_parameters(kept[task], ())
        assert sorted(vector.deltas) == sorted(name for name, p in parameters.items() if p.adapter is not None)
        for name, delta in vector.deltas.items():
            adapter = parameters[name].adapter
            product = adapter.lora_B["default"].weight.double() @ adapter.lora_A["default"].weight.double()
            torch.testing.assert_close(delta.dense().double(), 2 * product.detach(), rtol=1e-5, atol=1e-7)
            assert delta.shape == parameters[name].shape
        stored = load_task_vector(tmp_path / "tasks" / task)
        assert stored.base_hashes == vector.base_hashes
        assert stored.base_hashes.keys() == parameters.keys()
    merged = merge.merged_module
    layers = [set(map(id, own.parameters())) for own in merged.task_modules]
    assert layers[0] == layers[1], "one backbone and one adapter in memory"
    scores = quiet_trainer().test(merged, MultiTaskDataModule(data))
    found = {name: value for part in scores for name, value in part.items()}
    loaded = PeftModel.from_pretrained(quantized_model(base, way), tmp_path / "merged").eval()
    for task, own in data.items():
        with torch.no_grad():
            losses = [float(loaded(input_ids=batch, labels=batch).loss) for batch in own.test_dataloader()]
        assert found[f"score/{task}"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert not any(path.name == "model.safetensors" for path in (tmp_path / "merged").iterdir())

    session = MergeSession(list(TEXTS), RegMean(), tmp_path)
    session.note_base(Counting(base, way))
    session.restore()
    again = session.fuse(Average(), module=Counting(base, way)).task_module("pet")
    x = data["pet"].rows[:4]
    factors = [load_task_vector(tmp_path / "tasks" / task).deltas for task in TEXTS]
    start = {n: layer for n, layer in quantized_layers(again).items() if n in factors[0]}
    assert len(start) == 3
    with torch.no_grad():
        assert again.loss(x).isfinite()
        for name, layer in backbone_parameters(again, ()).items():
            if layer.adapter is not None:
                inputs = torch.randn(5, layer.shape[1])
                expected = (
                    layer.quantized(inputs).double()
                    + inputs.double() @ sum(own[name].dense().double() / 2 for own in factors).T
                )
                torch.testing.assert_close(layer.adapter(inputs).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_another_quantized_base_is_noticed(way: str, base: str, tmp_path: Path):
    session = MergeSession(["a", "b"], Average())
    session.note_base(Counting(base, way), "a")
    session.note_base(Counting(base, way), "b")
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] += 0.5  # in a layer without an adapter
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"Task 'b'.* another base than task 'a'.*up_proj"):
        session.note_base(Counting(str(tmp_path / "other"), way), "b")
    if way == "nf4":
        other = Counting(base, way)
        other.model.base_model.model.model.layers[0].mlp.up_proj.weight.quant_state.absmax.add_(1)
        with pytest.raises(ValueError, match=r"another base than task 'a'.*up_proj"):
            session.note_base(other, "b")


def test_predictions_change_nothing_that_is_stored(base: str):
    """Nor in a session: bitsandbytes would arrange weights in another way on some CPUs, and train no more."""
    session, module = MergeSession(["a"], Average()), Counting(base)
    session.note_base(module, "a")
    x = Sequences(1).rows[:4]
    with torch.no_grad():
        module.eval().loss(x)
    session.note_base(module, "a")
    module.train().loss(x).backward()
    session.collect(module, "a")


REFUSED = {
    "full": (lambda base: Counting(base, adapters=None), "only LoRA adapters of linear and embedding layers can be"),
    "beside": (
        lambda base: made(base, lambda m: m.model.base_model.model.model.norm.weight.requires_grad_(True)),
        r"model\.model\.norm\.weight would be trained in full",
    ),
}


def made(base: str, change: object) -> Counting:
    module = Counting(base)
    change(module)
    return module


@pytest.mark.parametrize("case", REFUSED)
def test_more_than_adapters_is_refused_before_training(case: str, base: str):
    make, said = REFUSED[case]
    with pytest.raises(ValueError, match=said):
        MergeSession(["a"], Average()).note_base(make(base))


@pytest.mark.parametrize(
    "method", [TIES(), Fisher(), RegMean(propagate=True)], ids=lambda method: type(method).__name__
)
def test_methods_without_a_low_rank_result_are_refused_before_training(method: object, base: str):
    with pytest.raises(ValueError, match=r"The base is quantized, so what is merged must be an adapter, but"):
        MergeSession(["a"], method).note_base(Counting(base))


def test_fisher_information_of_quantized_weights_is_refused(base: str):
    session, module = MergeSession(["a"], Average()), Counting(base)
    session.note_base(module)
    session.collect(module, "a")
    with pytest.raises(ValueError, match=r"gradients of whole weights, and model\..* is quantized"):
        session.collect_statistics(module, "a", [Sequences(1).rows[:2]], ["fisher"])


def test_studies_of_whole_weights_are_refused(base: str):
    session, module = MergeSession(["a"], Average()), Counting(base)
    session.note_base(module)
    session.collect(module, "a")
    with pytest.raises(ValueError, match=r"The base is quantized, and side by side, merges are studied as whole"):
        next(session.merge_side_by_side([session.recipe], module))


def test_a_fit_goes_on_from_a_checkpoint(base: str, tmp_path: Path):
    """Of an epoch's end, with all that it would have been without an interruption."""
    data, found = texts(tmp_path, base).tasks["pet"], []
    data.setup("fit")
    batches = [batch for batch, _ in zip(data.train_dataloader(), range(3), strict=False)]
    for ends in ([1, 2], [2]):
        for epochs in ends:
            L.seed_everything(0)
            optimizer = partial(torch.optim.AdamW, lr=1e-2)
            module = TransformerTask(base, lora=ADAPTERS, optimizer=optimizer, quantization=WAYS["nf4"])
            merge = DRMMergeCallback(["a"], Average())
            trainer = quiet_trainer(callbacks=[merge], max_epochs=epochs, limit_val_batches=0)
            resumed = {"ckpt_path": tmp_path / "a.ckpt", "weights_only": False} if epochs > ends[0] else {}
            trainer.fit(configured(module, data), DataLoader(batches, batch_size=None), **resumed)
            trainer.save_checkpoint(tmp_path / "a.ckpt")
        found.append(merge.task_vectors["a"].deltas)
    for name, delta in found[1].items():
        assert float(delta.dense().abs().max()) > 1e-3
        torch.testing.assert_close(found[0][name].dense(), delta.dense(), rtol=1e-5, atol=1e-7)


def test_strategies_that_shard_are_refused(base: str):
    with pytest.raises(ValueError, match="Counting has quantized weights, which FSDPStrategy would shard"):
        refuse_quantized(FSDPStrategy(), Counting(base))


def test_averages_of_codes_are_refused_before_training(base: str):
    merge, averaging = DRMMergeCallback(["a"], Average()), L.pytorch.callbacks.EMAWeightAveraging(decay=0.9)
    with pytest.raises(ValueError, match=r"EMAWeightAveraging would average the codes of quantized weights, such as m"):
        quiet_trainer(callbacks=[merge, averaging]).fit(Counting(base), Sequences(1))


def test_settings_of_quantization_that_do_not_fit_are_refused(base: str):
    with pytest.raises(ValueError, match="quantization has no load_in_3bit"):
        TransformerTask(base, 2, lora=ADAPTERS, quantization={"load_in_3bit": True})
