"""The fit of coefficients against finite differences and a closed form, in float64."""

from collections.abc import Mapping
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from helpers.tiny import VectorTask
from lightning_drm.modules import MultiTaskModule, batch_norms
from lightning_drm.tuning import MONITOR, CoefficientFit, Parts, loss_of

TASKS = ["a", "b"]


class Line(L.LightningModule):
    """Predicts a number; all of it is merged, so its squared error is quadratic in the coefficients."""

    head_names = ()

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[:, 0]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.log("own_loss", loss)
        return {"loss": loss}


def random_parts(model: MultiTaskModule, seed: int = 1, size: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first = model.task_modules[0]
    shapes = {n: p.shape for n, p in first.named_parameters() if not n.startswith("head")}
    return {n: size * torch.randn(2, *shape, generator=generator, dtype=torch.float64) for n, shape in shapes.items()}


def fit_of(
    model: MultiTaskModule, parts: Mapping[str, Tensor], objective: str = "labels", *, judged: int = 8, **options: Any
) -> CoefficientFit:
    by_parameter = options.pop("by_parameter", True)
    settings = {"learning_rate": 0.05, "batch_size": 16, "by_batch": {}, **options}
    start = {name: [0.3, 0.3] for name in parts}
    return CoefficientFit(
        model, Parts(parts, start, by_parameter=by_parameter), loss_of(objective),
        num_judged=dict.fromkeys(TASKS, judged), **settings,
    )  # fmt: skip


def run(fit: CoefficientFit, batches: Mapping[str, Any], judged: list[Any], **options: Any) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, check_val_every_n_epoch=None,
        **{"val_check_interval": 10, "max_steps": 400, "max_epochs": -1, **options},
    )  # fmt: skip
    trainer.validate(fit, judged, verbose=False)
    trainer.fit(fit, CombinedLoader(dict(batches), "max_size_cycle"), judged)
    return trainer


def samples(seed: int, count: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(2, (count,), generator=generator)


@pytest.mark.parametrize("objective", ["labels", "entropy"])
@pytest.mark.parametrize("by_parameter", [True, False])
def test_the_gradient_is_that_of_finite_differences(objective: str, by_parameter: bool):
    model = MultiTaskModule.assemble({task: VectorTask(seed=0).double() for task in TASKS})
    fit = fit_of(model, random_parts(model), objective, by_parameter=by_parameter)
    batch = {task: samples(seed) for seed, task in enumerate(TASKS)}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def by_hand(coefficients: Tensor) -> float:
        """The mean loss over tasks, with weights put into the modules one by one."""
        total = 0.0
        for task in TASKS:
            module = VectorTask(seed=0).double()
            state = dict(model.task_module(task).state_dict())
            for place, name in enumerate(fit.parts.names):
                row = coefficients[place if by_parameter else 0]
                part = fit.parts.get_buffer(f"part_{place}")
                state[name] = state[name] + row[0] * part[0] + row[1] * part[1]
            module.load_state_dict(state)
            logits, y = module(batch[task][0]), batch[task][1]
            if objective == "labels":
                total += float(nn.functional.cross_entropy(logits, y))
            else:
                p = logits.softmax(1).detach().numpy()
                total += float(-(p * np.log(p)).sum(1).mean())
        return total / len(TASKS)

    loss = fit.training_step(batch, 0)
    loss.backward()
    point = fit.parts.coefficients.detach()
    assert float(loss.detach()) == pytest.approx(by_hand(point), abs=1e-12)
    step = 1e-6
    for index in np.ndindex(*point.shape):
        high, low = point.clone(), point.clone()
        high[index] += step
        low[index] -= step
        expected = (by_hand(high) - by_hand(low)) / (2 * step)
        assert float(fit.parts.coefficients.grad[index]) == pytest.approx(expected, abs=1e-8)
    assert [n for n, p in fit.named_parameters() if p.requires_grad] == ["parts.coefficients"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def quadratic(seed: int = 0) -> tuple[MultiTaskModule, dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    torch.manual_seed(seed)
    model = MultiTaskModule.assemble({task: Line().double() for task in TASKS})
    generator = torch.Generator().manual_seed(seed)
    data = {}
    for task in TASKS:
        x = torch.randn(16, 4, generator=generator, dtype=torch.float64)
        data[task] = x, x @ torch.randn(4, generator=generator, dtype=torch.float64)
    return model, random_parts(model, seed), data


def test_coefficients_reach_the_optimum_of_a_quadratic_loss():
    model, parts, data = quadratic()
    base = {name: tensor.clone() for name, tensor in model.task_modules[0].state_dict().items()}
    rows, targets = [], []
    for task in TASKS:  # the prediction is linear in λ: one column for each parameter and task
        x, y = data[task]
        weight = x.numpy() @ parts["layer.weight"][:, 0].numpy().T
        bias = np.tile(parts["layer.bias"][:, 0].numpy(), (len(x), 1))
        rows.append(np.hstack([weight, bias]))
        targets.append((y - x @ base["layer.weight"][0] - base["layer.bias"]).numpy())
    expected, *_ = np.linalg.lstsq(np.vstack(rows), np.concatenate(targets), rcond=None)
    lowest = float(np.mean((np.vstack(rows) @ expected - np.concatenate(targets)) ** 2))

    fit = fit_of(model, parts, judged=16, learning_rate=0.1)
    loaders = {task: DataLoader(TensorDataset(*pair), batch_size=16) for task, pair in data.items()}
    run(fit, loaders, list(loaders.values()), max_steps=600)
    check, coefficients = fit.best
    order = [fit.parts.names.index(name) for name in ("layer.weight", "layer.bias")]
    found = coefficients[order].numpy().reshape(-1)
    # The bias has one degree of freedom for two coefficients: only its sum is determined.
    bias = parts["layer.bias"][:, 0].numpy()
    assert found[:2] == pytest.approx(expected[:2], abs=1e-5)
    assert float(found[2:] @ bias) == pytest.approx(float(expected[2:] @ bias), abs=1e-5)
    assert check.loss == pytest.approx(lowest, abs=1e-8)
    assert fit.checks[0].step == 0
    assert fit.checks[0].loss == pytest.approx(np.mean([float(fit_loss(model, parts, *data[t])) for t in TASKS]))


def fit_loss(model: MultiTaskModule, parts: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The squared error at the start."""
    state = model.task_modules[0].state_dict()
    weight, bias = (state[name] + 0.3 * parts[name].sum(0) for name in ("layer.weight", "layer.bias"))
    return ((x @ weight[0] + bias - y) ** 2).mean()


def test_the_start_is_kept_where_nothing_is_better_and_the_fit_ends_early():
    model, parts, data = quadratic(1)
    other = {task: (x, -3 * y) for task, (x, y) in data.items()}  # what is learned makes these worse
    fit = fit_of(model, parts, judged=16, learning_rate=0.1)
    learn = {task: DataLoader(TensorDataset(*pair), batch_size=16) for task, pair in data.items()}
    judged = [DataLoader(TensorDataset(*pair), batch_size=16) for pair in other.values()]
    trainer = run(fit, learn, judged, callbacks=[EarlyStopping(MONITOR, patience=2)])
    lowest = min(check.loss for check in fit.checks)
    assert fit.best[0].loss == lowest <= fit.checks[0].loss
    assert trainer.global_step < 400
    after = [check.loss for check in fit.checks[1:]]
    assert all(loss >= min(after) for loss in after[-2:])
    assert len(after) == after.index(min(after)) + 3, "two checks in a row without a lower loss"


def test_the_loss_of_a_check_is_the_mean_over_samples_whatever_the_batches():
    model, parts, data = quadratic(2)
    fit = fit_of(model, parts, judged=11, batch_size=4)
    pairs = {task: (x[:11], y[:11]) for task, (x, y) in data.items()}
    run(
        fit,
        {task: DataLoader(TensorDataset(*pair), batch_size=4) for task, pair in data.items()},
        [DataLoader(TensorDataset(*pair), batch_size=4) for pair in pairs.values()],
        max_steps=1,
    )
    for task in TASKS:
        assert fit.checks[0].losses[task] == pytest.approx(float(fit_loss(model, parts, *pairs[task])), abs=1e-12)


def test_a_start_without_a_finite_loss_is_refused():
    model, parts, data = quadratic()
    data["b"] = (data["b"][0], data["b"][1] * torch.nan)
    loaders = {task: DataLoader(TensorDataset(*pair), batch_size=16) for task, pair in data.items()}
    with pytest.raises(ValueError, match="The loss of b is no finite number where the coefficients start"):
        run(fit_of(model, parts, judged=16), loaders, list(loaders.values()))


class Normed(VectorTask):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))


@pytest.mark.parametrize("by_itself", [True, False])
def test_batch_norms_normalize_batches_on_themselves_where_their_statistics_will_be_estimated_again(by_itself: bool):
    torch.manual_seed(0)
    model = MultiTaskModule.assemble({task: Normed().double() for task in TASKS})
    layers = {task: list(batch_norms(model.task_module(task)).values()) if by_itself else [] for task in TASKS}
    fit = fit_of(model, random_parts(model), by_batch=layers)
    x, y = samples(0)
    statistics = {name: tensor.clone() for name, tensor in model.state_dict().items() if "running" in name}
    weights = fit.weights()
    found = fit.loss_of("a", (x, y), 0, weights)
    hidden = x @ weights["backbone.0.weight"].T + weights["backbone.0.bias"]
    variance, mean = torch.var_mean(hidden, 0, correction=0)
    if not by_itself:
        variance, mean = torch.ones(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    normed = (hidden - mean) / (variance + 1e-5).sqrt()
    normed = normed * weights["backbone.1.weight"] + weights["backbone.1.bias"]
    expected = nn.functional.cross_entropy(model.task_module("a").head(normed), y)
    assert float(found) == pytest.approx(float(expected), abs=1e-12)
    assert all(
        torch.equal(tensor, statistics[name]) for name, tensor in model.state_dict().items() if "running" in name
    )
    assert not any(module.training for module in model.modules())
