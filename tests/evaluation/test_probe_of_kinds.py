"""The head on the untouched base where a sample has several vectors: one per token, or one per choice."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from helpers.tiny import save_tiny_bert
from lightning_drm import TransformerTask
from lightning_drm.evaluation import linear_probe
from lightning_drm.kinds import IGNORE_INDEX, Choice, Tokens

DECAY = 1e-4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_bert(tmp_path_factory.mktemp("base"))


def module_of(base: str, kind: Tokens | Choice, num_outputs: int) -> TransformerTask:
    torch.manual_seed(0)
    return TransformerTask(base, num_outputs, kind=kind, pooling="mean").eval()


def token_batches(padding: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(6):
        ids = torch.randint(5, 14, (8, 5), generator=generator)
        labels = torch.where(torch.rand(8, 5, generator=generator) < 0.3, torch.randint(3, (8, 5)), ids % 3)
        labels[:, 0] = IGNORE_INDEX
        fields = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        fill = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE_INDEX}
        batches.append({n: torch.nn.functional.pad(t, (0, padding), value=fill[n]) for n, t in fields.items()})
    return batches


def test_tokens_that_count_and_no_others_make_the_head(base):
    """The optimum is scikit-learn's on the standardized vectors of those tokens; padding plays no part."""
    module = module_of(base, Tokens(), 3)
    torch.manual_seed(1)
    batches = token_batches(0)
    torch.manual_seed(1)
    padded = token_batches(4)
    state = linear_probe(module, module.head_names, batches, 100)
    again = linear_probe(module, module.head_names, padded, 100)
    assert state is not None
    assert again is not None
    features, targets = [], []
    for batch in batches:
        counts = batch["labels"] != IGNORE_INDEX
        hidden = module.backbone(input_ids=batch["input_ids"]).last_hidden_state
        features.append(hidden[counts].detach().double())
        targets.append(batch["labels"][counts])
    x, y = torch.cat(features).numpy(), torch.cat(targets).numpy()
    scaled = (x - x.mean(0)) / x.std(0, ddof=1)
    best = LogisticRegression(C=1 / (2 * DECAY * len(y)), max_iter=100_000, tol=1e-12).fit(scaled, y)
    expected = best.predict_proba(scaled)
    for found in (state, again):
        logits = torch.tensor(x) @ found["model.classifier.weight"].double().T + found["model.classifier.bias"]
        assert np.abs(logits.softmax(-1).detach().numpy() - expected).max() < 2e-2
    for name, tensor in state.items():
        assert torch.allclose(tensor, again[name], atol=1e-2), name


def test_choices_share_one_vector_of_weights(base):
    """The optimum is that of a conditional logit, solved by scipy."""
    module = module_of(base, Choice(), 1)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for size in (8, 8, 8, 5):
        ids = torch.randint(5, 14, (size, 3, 4), generator=generator)
        labels = torch.where(
            torch.rand(size, generator=generator) < 0.3,
            torch.randint(3, (size,), generator=generator),
            ids[..., 1].argmax(-1),
        )
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    state = linear_probe(module, module.head_names, batches, 100)
    assert state is not None
    with torch.no_grad():
        x = torch.cat(
            [module.backbone(input_ids=b["input_ids"].flatten(0, 1)).last_hidden_state.mean(1) for b in batches]
        )
    x, y = x.double().numpy(), torch.cat([b["labels"] for b in batches]).numpy()
    scaled = (x - x.mean(0)) / x.std(0, ddof=1)

    def objective(weight: np.ndarray) -> float:
        ratings = (scaled @ weight).reshape(len(y), 3)
        log = ratings - np.log(np.exp(ratings).sum(1, keepdims=True))
        return -log[np.arange(len(y)), y].mean() + DECAY * (weight**2).sum()

    best = minimize(objective, np.zeros(x.shape[1]), method="BFGS", options={"gtol": 1e-9})
    found = state["model.classifier.weight"].double().numpy()[0] * x.std(0, ddof=1)
    assert objective(found) == pytest.approx(best.fun, rel=1e-4)
    assert objective(np.zeros(x.shape[1])) > 1.1 * best.fun, "the case shows nothing"
