"""Encoder-decoder models: loss and what they write, against plain loops, whatever the batches are."""

import copy
import pickle
from functools import partial

import pytest
import torch
from peft import LoraConfig
from torch.utils.data import DataLoader

from helpers import tiny_language
from helpers.tiny import quiet_trainer
from kinds.test_text_metrics import plain_rouge
from lightning_drm import MultiTaskModule, TransformerTask
from lightning_drm.data import SequenceTask
from lightning_drm.deltas import Base, backbone_parameters
from lightning_drm.kinds import SequenceToSequence
from lightning_drm.merging import LowRank
from lightning_drm.modules import duplicate

finetuned = partial(tiny_language.finetuned, steps=80)
LORA = LoraConfig(r=4, lora_alpha=32, target_modules=["q", "v", "wi", "wo"])
START, END = 0, 1


@torch.no_grad()
def plainly(module: TransformerTask, data: SequenceTask, split: str) -> tuple[float, list[str], list[str]]:
    """Mean loss over tokens, what is written and what should be: one sample and one token at a time, in float64."""
    model = module.model.eval().double()
    losses, written, targets = [], [], data.rows[split]["labels"][:]
    words = {number: word for word, number in data.tokenizer.get_vocab().items()}
    for sample in data.splits[split]:
        ids, labels = torch.tensor(sample["input_ids"])[None], sample["labels"].tolist()
        decoded = torch.tensor([[START, *labels[:-1]]])
        scores = model(input_ids=ids, decoder_input_ids=decoded).logits[0].log_softmax(-1)
        losses += [-scores[place, label].item() for place, label in enumerate(labels)]
        said = [START]
        while len(said) <= data.kind.max_new_tokens and said[-1] != END:
            said.append(int(model(input_ids=ids, decoder_input_ids=torch.tensor([said])).logits[0, -1].argmax()))
        written.append(" ".join(words[token] for token in said if token > END))
    model.float()
    return sum(losses) / len(losses), written, targets


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_scores_are_those_of_single_texts(answers: SequenceTask, t5: str, lora: LoraConfig | None):
    module = finetuned(answers, t5, lora)
    found = quiet_trainer().validate(module, datamodule=answers, verbose=False)[0]
    loss, written, targets = plainly(module, answers, "validation")
    pairs = list(zip(written, targets, strict=True))
    exact = sum(ours == theirs for ours, theirs in pairs) / len(pairs)
    assert found["val_loss"] == pytest.approx(loss, rel=1e-5)
    assert found["val_exact_match"] == pytest.approx(exact)
    for key in ("rouge1", "rouge2", "rougeL"):
        assert found[f"val_{key}"] == pytest.approx(sum(plain_rouge(*pair)[key] for pair in pairs) / len(pairs)), key
    assert 0 < found["val_rouge1"] < 1, "the case shows nothing"
    assert (module.score, module.higher_is_better) == ("exact_match", True)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_what_is_written_does_not_depend_on_batches(answers: SequenceTask, t5: str, num_beams: int):
    module = finetuned(answers, t5)
    module.kind.num_beams = num_beams
    module.eval()
    samples = list(answers.splits["test"])
    assert len({len(sample["input_ids"]) for sample in samples}) > 3, "nothing is padded"
    found = []
    for size, order in ((1, 1), (5, 1), (5, -1), (12, 1)):
        batches = DataLoader(samples[::order], size, collate_fn=answers.collate)
        texts = [pair for batch in batches for pair in zip(*module.kind.generate(module.model, batch), strict=True)]
        found.append(texts[::order])
    assert found[0] == found[1] == found[2] == found[3]
    assert [target for _, target in found[0]] == answers.rows["test"]["labels"][:]
    assert len({written for written, _ in found[0]}) > 2, "the case shows nothing"


def test_writing_stops_where_it_is_told_to(answers: SequenceTask, t5: str):
    module = TransformerTask(t5)
    answers.setup("fit")
    module.configure_for(answers)
    module.eval()
    batch = next(iter(answers.test_dataloader()))
    with torch.no_grad():  # it never ends, and repeats one word
        module.model.lm_head.weight = torch.nn.Parameter(module.model.lm_head.weight.clone())
        module.model.lm_head.weight[END] = 0
        module.model.lm_head.weight[8] = 100 * torch.sign(module.model.lm_head.weight[8])
    module.kind.max_new_tokens = 3
    written, _ = module.kind.generate(module.model, batch)
    assert max(len(text.split()) for text in written) == 3


def test_copies_write_alike(answers: SequenceTask, t5: str):
    """A module is copied, assembled and pickled on its way; what it decodes with must come along."""
    module = finetuned(answers, t5, steps=40).eval()
    batch = next(iter(answers.test_dataloader()))
    expected = module.kind.generate(module.model, batch)
    assembled = MultiTaskModule.assemble({"a": module, "b": module}).task_module("b")
    for copied in (copy.deepcopy(module), duplicate(module), assembled, pickle.loads(pickle.dumps(module))):
        assert copied.kind.generate(copied.model, batch) == expected
    assert copy.deepcopy(module).kind.tokenizer is module.kind.tokenizer, "it is large"


def test_without_a_tokenizer_nothing_is_decoded(t5: str):
    module = TransformerTask(t5, num_classes=0, kind=SequenceToSequence())
    with pytest.raises(RuntimeError, match="SequenceToSequence has no tokenizer to decode texts with: set up"):
        module.kind.generate(module.model, {"input_ids": torch.ones(1, 2), "labels": torch.ones(1, 2)})


@pytest.mark.parametrize(
    ("settings", "problem"),
    [({"max_new_tokens": 0}, "max_new_tokens 0"), ({"max_new_tokens": -1, "num_beams": 0}, "-1 and num_beams 0")],
)
def test_numbers_below_one_are_refused(settings: dict[str, int], problem: str):
    with pytest.raises(ValueError, match=f"Expected at least 1, got .*{problem}"):
        SequenceToSequence(**settings)


def test_tied_embeddings_stay_tied(answers: SequenceTask, t5: str):
    module = finetuned(answers, t5, steps=2)
    merged = MultiTaskModule.assemble({"a": module, "b": module})
    for model in (module.model, *(merged.task_module(task).model for task in "ab")):
        shared = model.shared.weight
        assert model.lm_head.weight is shared
        assert model.encoder.embed_tokens.weight is shared
        assert model.decoder.embed_tokens.weight is shared
    names = list(backbone_parameters(module, module.head_names))
    assert [name for name in names if "embed" in name or "shared" in name or "lm_head" in name] == [
        "model.shared.weight"
    ]


def test_lora_trains_adapters_alone(answers: SequenceTask, t5: str):
    module = TransformerTask(t5, lora=LORA)
    answers.setup("fit")
    module.configure_for(answers)
    assert all("lora_" in name for name, p in module.named_parameters() if p.requires_grad)
    base = Base()
    base.remember(module, (), "task")
    quiet_trainer(max_epochs=None, max_steps=3, limit_val_batches=0).fit(module, datamodule=answers)
    vector = base.task_vector(module, (), "task")
    assert {name.split(".")[-2] for name in vector.deltas} == set(LORA.target_modules)
    assert all(isinstance(delta, LowRank) and delta.dense().abs().max() > 0 for delta in vector.deltas.values())
