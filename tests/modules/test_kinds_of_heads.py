"""Heads on each token, and on each pair of question and choice, of several architectures."""

from collections.abc import Callable

import pytest
import torch
from lightning import seed_everything
from torch import Tensor, nn

from lightning_drm import TransformerTask
from lightning_drm.kinds import Choice, Kind, Tokens

Folder = Callable[[str], str]
WAYS = [  # T5's own model cannot be pooled: it asks for its decoder's inputs
    (architecture, pooling)
    for architecture in ("bert", "deberta", "llama", "t5")
    for pooling in ("model", "mean")
    if (architecture, pooling) != ("t5", "mean")
]
on_every_way = pytest.mark.parametrize(("architecture", "pooling"), WAYS)


def build(pretrained: Folder, architecture: str, kind: Kind, pooling: str, num_outputs: int) -> TransformerTask:
    seed_everything(0, verbose=False)
    return TransformerTask(pretrained(architecture), num_outputs, kind=kind, pooling=pooling).eval()


def token_numbers(*shape: int) -> Tensor:
    return torch.randint(3, 23, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_a_head_on_tokens_is_linear_in_their_last_hidden_states(pretrained: Folder, pooling: str):
    task = build(pretrained, "bert", Tokens(), pooling, 5)
    ids = token_numbers(2, 6)
    logits = task(input_ids=ids, attention_mask=torch.ones_like(ids))
    hidden = task.backbone(input_ids=ids).last_hidden_state
    (name,) = task.head_names
    head = task.get_submodule(name)
    assert isinstance(head, nn.Linear)
    expected = hidden.double() @ head.weight.double().T + head.bias.double()
    assert logits.shape == (2, 6, 5)
    assert torch.allclose(logits.double(), expected, atol=1e-6)


@on_every_way
def test_padding_changes_no_token(pretrained: Folder, architecture: str, pooling: str):
    task = build(pretrained, architecture, Tokens(), pooling, 4)
    ids = token_numbers(1, 5)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        alone = task(input_ids=ids, attention_mask=mask)
        padded = task(input_ids=nn.functional.pad(ids, (0, 3)), attention_mask=nn.functional.pad(mask, (0, 3)))
    assert padded.shape == (1, 8, 4)
    assert torch.allclose(padded[:, :5], alone, atol=1e-5)


@on_every_way
def test_each_choice_is_rated_by_itself(pretrained: Folder, architecture: str, pooling: str):
    task = build(pretrained, architecture, Choice(), pooling, 1)
    ids = token_numbers(2, 3, 6)
    if architecture == "t5":
        ids[..., -1] = 1  # the end of a text, where T5's head looks
    with torch.no_grad():
        ratings = task(input_ids=ids, attention_mask=torch.ones_like(ids))
        one_by_one = torch.stack(
            [
                task.model(input_ids=choice[None], attention_mask=torch.ones_like(choice[None])).logits.flatten()
                for question in ids
                for choice in question
            ]
        )
    assert ratings.shape == (2, 3)
    assert torch.allclose(ratings.flatten(), one_by_one.flatten(), atol=1e-5)


@pytest.mark.parametrize("kind", [Tokens(), Choice()], ids=["tokens", "choice"])
def test_kinds_without_images_say_so(pretrained: Folder, kind: Kind):
    with pytest.raises(ValueError, match=f"{type(kind).__name__} tasks are of text, not image"):
        TransformerTask(pretrained("vit"), 3, kind=kind, modality="image")
