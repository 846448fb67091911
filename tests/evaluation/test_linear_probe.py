"""The head on the untouched base: it must be the best one, and leave no trace."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional

from lightning_drm.evaluation import linear_probe
from lightning_drm.kinds import IGNORE_INDEX


class Net(nn.Module):
    def __init__(self, head: nn.Module | None = None, width: int = 12) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.5))
        self.head = head if head is not None else nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def make_batches(num_samples: int = 240, size: int = 32, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Three classes that overlap: the optimum is finite."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_samples, 5, generator=generator) * torch.tensor([1.0, 30.0, 0.01, 1.0, 1.0])
    scores = x / x.std(0) @ torch.randn(5, 3, generator=generator)
    y = (scores + 2 * torch.randn(num_samples, 3, generator=generator)).argmax(1)
    return list(zip(x.split(size), y.split(size), strict=True))


def features_of(net: Net, batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    modes = {child: child.training for child in net.modules()}
    net.eval()
    with torch.no_grad():
        features = torch.cat([net.body(x) for x, _ in batches])
    for child, mode in modes.items():
        child.training = mode
    return features, torch.cat([y for _, y in batches])


def loss_of(state: dict[str, Tensor], features: Tensor, targets: Tensor) -> float:
    logits = features.double() @ state["head.weight"].double().T + state["head.bias"].double()
    return float(functional.cross_entropy(logits, targets))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    net = Net()
    net(torch.randn(64, 5))  # statistics of batch norm that are not the initial ones
    return net


def optimum_of(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Standardised features, and scikit-learn's weights and biases for mean loss + 1e-4 ‖weight‖²."""
    scaled = (features - features.mean(0)) / features.std(0)
    penalty = 1 / (2 * 1e-4 * len(features))
    best = LogisticRegression(C=penalty, max_iter=100_000, tol=1e-12).fit(scaled.numpy(), targets.numpy())
    return torch.tensor(best.coef_), torch.tensor(best.intercept_)


def objective(weight: Tensor, bias: Tensor, features: Tensor, targets: Tensor) -> float:
    scaled = (features - features.mean(0)) / features.std(0)
    return float(functional.cross_entropy(scaled @ weight.T + bias, targets) + 1e-4 * weight.square().sum())


def assert_optimal(state: dict[str, Tensor], features: Tensor, targets: Tensor) -> None:
    features = features.double()
    weight = state["head.weight"].double() * features.std(0)
    bias = state["head.bias"].double() + state["head.weight"].double() @ features.mean(0)
    best = objective(*optimum_of(features, targets), features, targets)
    classes = int(targets.max()) + 1
    assert best < 0.9 * float(torch.tensor(float(classes)).log()), "the case has nothing to learn"
    assert objective(weight, bias, features, targets) == pytest.approx(best, rel=1e-5)


def test_reaches_the_optimum(net: Net) -> None:
    batches = make_batches()
    state = linear_probe(net, ["head"], batches, 100)
    assert state is not None
    assert {name: tensor.shape for name, tensor in state.items()} == {"head.weight": (3, 12), "head.bias": (3,)}
    assert_optimal(state, *features_of(net, batches))


def test_badly_scaled_features_reach_it_too() -> None:
    """As a transformer's hidden states are: correlated, on very different scales, some nearly constant."""
    torch.manual_seed(0)
    net = Net()
    net.body = nn.Identity()
    net.head = nn.Linear(96, 4)
    factors = torch.randn(400, 12)
    x = factors @ torch.randn(12, 96) + 0.05 * torch.randn(400, 96)
    x = x * torch.logspace(-2, 2, 96) + 3
    y = (factors[:, :4] + torch.randn(400, 4)).argmax(1)
    state = linear_probe(net, ["head"], [(x, y)], 1)
    assert state is not None
    assert_optimal(state, x, y)


def test_module_is_left_as_it_was(net: Net) -> None:
    net.body[0].eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    modes = [child.training for child in net.modules()]
    assert linear_probe(net, ["head"], make_batches(), 100) is not None
    assert [child.training for child in net.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())
    assert not net.head._forward_pre_hooks


def test_module_is_left_as_it_was_after_an_error(net: Net) -> None:
    with pytest.raises(RuntimeError):
        linear_probe(net, ["head"], [(torch.randn(4, 6), torch.zeros(4, dtype=torch.long))], 1)
    assert all(child.training for child in net.modules())
    assert not net.head._forward_pre_hooks


def test_dropout_and_batch_statistics_play_no_part(net: Net) -> None:
    batches = make_batches()
    first = linear_probe(net, ["head"], batches, 100)
    whole = linear_probe(net, ["head"], [(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))], 1)
    assert first is not None
    assert whole is not None
    for name in first:
        torch.testing.assert_close(first[name], whole[name], rtol=1e-4, atol=1e-5)


def test_samples_to_ignore_have_no_label(net: Net) -> None:
    """Padding samples repeat others, so that only their labels must not count."""
    batches = make_batches(size=60)
    padded = [(torch.cat([x, x[:20]]), torch.cat([y, torch.full((20,), IGNORE_INDEX)])) for x, y in batches]
    features, targets = features_of(net, batches)
    losses = []
    for given in (batches, padded):
        state = linear_probe(net, ["head"], given, 100)
        assert state is not None
        losses.append(loss_of(state, features, targets))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_no_more_batches_than_asked_for(net: Net) -> None:
    batches = make_batches()
    read = []

    def stream():
        for index, batch in enumerate(batches):
            read.append(index)
            yield batch

    limited = linear_probe(net, ["head"], stream(), 3)
    assert read == [0, 1, 2]
    expected = linear_probe(net, ["head"], batches[:3], 100)
    assert limited is not None
    assert expected is not None
    assert all(torch.equal(limited[name], expected[name]) for name in expected)


class Tokens(nn.Module):
    """A head on every token, not on one vector per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x[:, None].repeat(1, 4, 1)).mean(1)


def test_heads_that_cannot_be_probed() -> None:
    batches = make_batches()
    deep = Net(nn.Sequential(nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 3)))
    assert linear_probe(deep, ["head"], batches, 9) is None
    assert linear_probe(Net(nn.Linear(12, 3, bias=False)), ["head"], batches, 9) is None
    assert linear_probe(deep, ["head.0", "head.2"], batches, 9) is None
    assert linear_probe(Net(), ["head.weight"], batches, 9) is None
    assert linear_probe(Net(), [], batches, 9) is None
    assert linear_probe(Tokens(), ["head"], batches, 9) is None


def test_half_precision_head(net: Net) -> None:
    net.bfloat16()
    batches = [(x.bfloat16(), y) for x, y in make_batches()]
    state = linear_probe(net, ["head"], batches, 100)
    assert state is not None
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_features_that_never_change_have_no_weight(net: Net) -> None:
    with torch.no_grad():
        net.body[0].weight[2] = 0
        net.body[0].bias[2] = -1e6  # a dead unit
    state = linear_probe(net, ["head"], make_batches(), 100)
    assert state is not None
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert state["head.weight"][:, 2].abs().max() < 1e-3
