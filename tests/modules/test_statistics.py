"""Statistics of training data, against what the models themselves say and against plain loops."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model, T5Config, T5ForConditionalGeneration

from helpers.tiny import save_tiny_bert
from lightning_drm import TransformerTask
from lightning_drm.kinds import Choice, Kind, Regression, Tokens
from lightning_drm.modules import fisher_information, gram_matrices

LAYERS = "model.encoder.encoder.layer"
Batch = dict[str, Tensor]


def texts(seed: int, size: int = 6, length: int = 7) -> Batch:
    """Token numbers with padding at the end."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 14, (size, length), generator=g)
    lengths = torch.randint(2, length + 1, (size,), generator=g)
    mask = (torch.arange(length) < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.randint(3, (size,), generator=g)}


@pytest.fixture
def bert(tmp_path: Path) -> TransformerTask:
    torch.manual_seed(0)
    return TransformerTask(save_tiny_bert(tmp_path / "base"), pooling="mean", num_classes=3)


def names_of(module: nn.Module, head: tuple[str, ...] = ()) -> set[str]:
    return {name for name, _ in module.named_parameters() if not name.startswith(head or ("nothing",))}


def mean_of_squares(inputs: list[Tensor]) -> Tensor:
    rows = torch.cat(inputs).double()
    return sum(torch.outer(row, row) for row in rows) / len(rows)


@pytest.mark.parametrize("count_padding", [False, True])
def test_gram_matrices_are_those_of_the_hidden_states(bert: TransformerTask, count_padding: bool):
    """The model returns what goes into its first layers, which is multiplied out row by row."""
    batches = [texts(seed) for seed in range(3)]
    names = names_of(bert, bert.head_names)
    matrices, leaders = gram_matrices(bert, bert.head_names, names, batches, count_padding=count_padding)
    seen: dict[int, list[Tensor]] = {0: [], 1: []}
    bert.eval()
    with torch.no_grad():
        for batch in batches:
            found = bert.backbone(batch["input_ids"], batch["attention_mask"], output_hidden_states=True)
            for layer, states in seen.items():
                kept = batch["attention_mask"].bool() | count_padding
                states.append(found.hidden_states[layer][kept])
    for layer, states in seen.items():
        for part in ("query", "key", "value"):
            name = f"{LAYERS}.{layer}.attention.self.{part}.weight"
            assert leaders[name] == f"{LAYERS}.{layer}.attention.self.query.weight"
            torch.testing.assert_close(matrices[leaders[name]].double(), mean_of_squares(states), rtol=1e-5, atol=1e-6)
    linear = {n for n in names if n.endswith("weight") and ("dense" in n or "self" in n) and "LayerNorm" not in n}
    assert leaders.keys() == linear
    assert len(matrices) == 9, "in two layers: one for query, key and value, and three dense ones; and the pooler"


def test_modules_stay_as_they_are(bert: TransformerTask):
    bert.train()
    bert.backbone.eval()
    frozen = next(bert.backbone.parameters()).requires_grad_(False)
    modes = {name: module.training for name, module in bert.named_modules()}
    before = {name: tensor.clone() for name, tensor in bert.state_dict().items()}
    names = names_of(bert, bert.head_names)
    gram_matrices(bert, bert.head_names, names, [texts(0)])
    fisher_information(bert, bert.head_names, names, [texts(0, size=1)])
    assert {name: module.training for name, module in bert.named_modules()} == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in bert.state_dict().items())
    assert all(parameter.grad is None for parameter in bert.parameters())
    assert not frozen.requires_grad
    assert not any(module._forward_pre_hooks for module in bert.modules())


def test_one_layer_at_a_time_gives_the_same(bert: TransformerTask):
    names, batches = names_of(bert, bert.head_names), [texts(seed) for seed in range(2)]
    at_once, _ = gram_matrices(bert, bert.head_names, names, batches)
    in_passes, leaders = gram_matrices(bert, bert.head_names, names, batches, max_bytes=1)
    assert len(in_passes) == 13, "layers of different passes share nothing"
    for name, matrix in at_once.items():
        assert torch.equal(in_passes[leaders[name]], matrix)


def test_under_adapters_inputs_are_those_of_the_adapted_model(bert: TransformerTask):
    inject_adapter_in_model(LoraConfig(target_modules=["query", "dense"], r=2, init_lora_weights=False), bert.backbone)
    names = {name.replace(".base_layer", "") for name in names_of(bert, bert.head_names) if "lora" not in name}
    matrices, leaders = gram_matrices(bert, bert.head_names, names, [texts(0)])
    seen: list[Tensor] = []
    layer = next(m for n, m in bert.named_modules() if n.endswith("layer.1.output.dense"))
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    bert.eval()
    with torch.no_grad():
        bert.classify(texts(0))
    hook.remove()
    name = next(name for name in leaders if name.endswith("layer.1.output.dense.weight"))
    kept = seen[0][texts(0)["attention_mask"].bool()]
    torch.testing.assert_close(matrices[leaders[name]].double(), mean_of_squares([kept]), rtol=1e-5, atol=1e-6)


class Repeated(nn.Module):
    """A layer that is called twice, and two that share their inputs only while `apart` is false."""

    head_names = ("head",)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.twice, self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)
        self.apart = False
        self.inputs: dict[str, list[Tensor]] = {"twice": [], "one": [], "two": []}

    def forward(self, x: Tensor) -> Tensor:
        y = self.twice(x)
        z = self.twice(y)
        other = z + 1 if bool(x.sum() > 100) else z
        for name, inputs in (("twice", x), ("twice", y), ("one", z), ("two", other)):
            self.inputs[name].append(inputs)
        return self.head(self.one(z) + self.two(other))


@pytest.mark.parametrize("apart", [False, True])
def test_layers_that_are_called_twice_or_only_sometimes_together(apart: bool):
    module = Repeated()
    batches = [(torch.full((3, 4), value), torch.zeros(3, dtype=torch.long)) for value in (1.0, 2.0)]
    if apart:
        batches.append((torch.full((3, 4), 50.0), torch.zeros(3, dtype=torch.long)))
    matrices, leaders = gram_matrices(module, ("head",), {"twice.weight", "one.weight", "two.weight"}, batches)
    assert (leaders["two.weight"] == "one.weight") is not apart
    for name in module.inputs:
        module.inputs[name].clear()
    with torch.no_grad():
        for x, _ in batches:
            module(x)
    for name, inputs in module.inputs.items():
        expected = mean_of_squares(inputs)
        torch.testing.assert_close(matrices[leaders[f"{name}.weight"]].double(), expected, rtol=1e-5, atol=1e-6)


class Writes(nn.Module):
    """A T5 that is trained to write, by teacher forcing."""

    head_names = ()

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"vocab_size": 23, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
        self.model = T5ForConditionalGeneration(T5Config(**sizes, pad_token_id=0, decoder_start_token_id=0))

    def classify(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.model(**batch).logits, batch["labels"]


@pytest.mark.parametrize("length", [7, 5], ids=["as long as the inputs", "shorter"])
def test_a_decoders_padding_is_that_of_its_own_positions(length: int):
    module, batch = Writes(), texts(0)
    g = torch.Generator().manual_seed(1)
    labels = torch.randint(5, 14, (6, length), generator=g)
    labels[torch.arange(length).expand(6, -1) >= torch.randint(1, length + 1, (6, 1), generator=g)] = -100
    batch["labels"] = labels
    names = names_of(module)
    matrices, leaders = gram_matrices(module, (), names, [batch])
    module.eval()
    seen: dict[str, Tensor] = {}
    layers = {name: layer for name, layer in module.named_modules() if f"{name}.weight" in leaders}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, inputs, name=name: seen.__setitem__(name, inputs[0]))
    with torch.no_grad():
        module.classify(batch)
    for name, inputs in seen.items():
        across = "EncDecAttention.k" in name or "EncDecAttention.v" in name
        kept = labels != -100 if "decoder" in name and not across else batch["attention_mask"].bool()
        expected = mean_of_squares([inputs[kept]])
        found = matrices[leaders[f"{name}.weight"]].double()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert any("EncDecAttention.k" in name for name in seen)


def test_weights_that_are_stored_in_out_have_the_gram_matrix_of_their_inputs():
    class Reads(nn.Module):
        head_names = ()

        def __init__(self) -> None:
            super().__init__()
            self.model = GPT2Model(GPT2Config(vocab_size=23, n_positions=16, n_embd=12, n_layer=1, n_head=2))

        def classify(self, batch: Batch) -> tuple[Tensor, Tensor]:
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            return self.model(**inputs).last_hidden_state[:, 0], batch["labels"]

    matrices, leaders = gram_matrices(module := Reads(), (), names_of(module), [texts(0)])
    shapes = {name.partition("h.0.")[2]: tuple(matrices[leader].shape) for name, leader in leaders.items()}
    assert shapes == {
        "attn.c_attn.weight": (12, 12),
        "attn.c_proj.weight": (12, 12),
        "mlp.c_fc.weight": (12, 12),
        "mlp.c_proj.weight": (48, 48),
    }


def test_fisher_information_is_the_expectation_over_all_classes(bert: TransformerTask):
    """By plain loops over examples and classes, in float64."""
    names = names_of(bert, bert.head_names)
    examples = [texts(seed, size=1) for seed in range(3)]
    found, norm = fisher_information(bert, bert.head_names, names, examples)
    bert.double().eval()
    expected = {name: torch.zeros_like(tensor) for name, tensor in bert.named_parameters() if name in names}
    for example in examples:
        p = bert.classify(example)[0].softmax(-1)[0].tolist()
        for y in range(3):
            bert.zero_grad()
            bert.classify(example)[0].log_softmax(-1)[0, y].backward()
            for name, tensor in bert.named_parameters():
                if name in expected and tensor.grad is not None:
                    expected[name] += p[y] * tensor.grad**2 / len(examples)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].double(), tensor, rtol=1e-4, atol=1e-9)
    assert norm == pytest.approx(sum(float(t.square().sum()) for t in expected.values()) ** 0.5, rel=1e-5)


def test_fisher_information_does_not_depend_on_batches_or_true_labels(bert: TransformerTask):
    names = names_of(bert, bert.head_names)
    batch = texts(0, size=4)
    alone = [{name: tensor[i : i + 1] for name, tensor in batch.items()} for i in range(4)]
    others = {**batch, "labels": (batch["labels"] + 1) % 3}
    one, together, relabeled = (
        fisher_information(bert, bert.head_names, names, some)[0] for some in (alone, [batch], [others])
    )
    for name, tensor in one.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-4, atol=1e-9)
        assert torch.equal(relabeled[name], together[name])


@pytest.mark.parametrize(
    ("logits", "target"),
    [
        (lambda n: torch.zeros(n, 1), lambda n: torch.zeros(n)),
        (lambda n: torch.zeros(n, 4), lambda n: torch.zeros(n, 4)),
        (lambda n: torch.zeros(n, 5, 4), lambda n: torch.zeros(n, 5, dtype=torch.long)),
    ],
    ids=["regression", "several labels", "tokens"],
)
def test_fisher_information_needs_classes(logits: Callable[[int], Tensor], target: Callable[[int], Tensor]):
    class Other(nn.Module):
        head_names = ()

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def classify(self, batch: Batch) -> tuple[Tensor, Tensor]:
            return logits(6) + self.layer.weight.sum(), target(6)

    with pytest.raises(ValueError, match=r"it needs logits \(batch, classes\) and one class for each example; Other"):
        fisher_information(Other(), (), {"layer.weight"}, [texts(0)])


@pytest.mark.parametrize("kind", [Choice(), Regression(), Tokens()], ids=lambda kind: type(kind).__name__)
def test_a_kind_of_task_says_whether_there_are_classes(kind: Kind):
    """Choices are rated one below the other; a rating is no class, and a tag is not one of an example."""

    class OfKind(nn.Module):
        head_names = ()

        def __init__(self) -> None:
            super().__init__()
            self.kind = kind
            self.layer = nn.Linear(2, 1, bias=False)

        def classify(self, batch: Batch) -> tuple[Tensor, Tensor]:
            ratings = self.layer(torch.arange(12.0).view(6, 2))
            if isinstance(kind, Tokens):
                return ratings.view(2, 3, 1).expand(2, 3, 4), torch.zeros(2, 3, dtype=torch.long)
            return ratings, torch.zeros(2 if isinstance(kind, Choice) else 6, dtype=torch.long)

    module = OfKind()
    if not isinstance(kind, Choice):
        with pytest.raises(ValueError, match="it needs logits"):
            fisher_information(module, (), {"layer.weight"}, [texts(0)])
        return
    found, _ = fisher_information(module, (), {"layer.weight"}, [texts(0)])
    x = torch.arange(12.0).view(2, 3, 2).double()
    p = (x @ module.layer.weight.detach().double().T).squeeze(-1).softmax(-1)
    mean = (p[..., None] * x).sum(1, keepdim=True)
    expected = (p[..., None] * (x - mean) ** 2).sum(1).mean(0, keepdim=True)  # of log-linear models: a variance
    torch.testing.assert_close(found["layer.weight"].double(), expected, rtol=1e-5, atol=1e-7)


def test_without_batches_there_are_no_statistics(bert: TransformerTask):
    names = names_of(bert, bert.head_names)
    with pytest.raises(ValueError, match="no batches to take Gram matrices from"):
        gram_matrices(bert, bert.head_names, names, [])
    with pytest.raises(ValueError, match="no batches to take Fisher information from"):
        fisher_information(bert, bert.head_names, names, [])
