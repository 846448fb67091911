"""TIES and DARE-TIES in core space, against the plain float64 version on dense deltas, which has no factors."""

import pytest
import torch
from torch import Tensor

from helpers import reference
from helpers.devices import on
from lightning_drm.merging import DARETIES, SVC, TIES, Average, LowRank, Method
from merging.test_reference import error, low_rank

CORE = [TIES(0.3, space="core"), TIES(0.3, "tensor", space="core"), DARETIES(0.6, space="core")]
SHAPES = [(30, 42), (42, 30), (9, 40), (40, 5), (6, 6)]


def products(factors: list[LowRank]) -> list[Tensor]:
    return [delta.up.double() @ delta.down.double() for delta in factors]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ranks", [(3,), (2, 2), (4, 1, 3), (5, 5, 5, 5), (3, 0, 2)], ids=str)
def test_ties_is_that_of_the_plain_version(shape, ranks, device):
    """Ranks add up to more than a matrix has sides in some of these, and one task has no delta at all in others."""
    factors = low_rank(shape, ranks)
    coefficients = [1.0 - 0.15 * task for task in range(len(ranks))]
    expected = reference.core_ties(products(factors), coefficients, 0.3, 1.7)
    factors = on(device, factors)
    merged = TIES(0.3, "tensor", 1.7, "core").merge_low_rank(factors, coefficients)
    assert error(merged.dense().cpu(), expected) < 1e-11
    assert merged.rank <= min(sum(ranks), *shape)
    assert torch.equal(TIES(0.3, "tensor", 1.7, "core").merge(factors, coefficients), merged.dense())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_are_computed_in_double(dtype, device):
    factors = [delta.to(dtype) for delta in low_rank((30, 42), (4, 2, 3))]
    merged = TIES(0.3, space="core").merge(on(device, factors)).cpu()
    assert merged.dtype == torch.float32
    assert error(merged, reference.core_ties(products(factors), density=0.3)) < 2e-7


def test_it_is_another_method_than_on_entries():
    factors = low_rank((30, 42), (4, 2, 3))
    for density in (0.3, 1.0):
        in_core, on_entries = (TIES(density, space=space).merge(factors) for space in ("core", "entries"))
        assert error(in_core, on_entries) > 0.1


@pytest.mark.parametrize("method", CORE, ids=repr)
def test_how_a_delta_is_factored_changes_nothing(method: Method):
    """Factors that are scaled against each other, mixed, or more than are needed."""
    factors = low_rank((30, 42), (4, 2, 3))
    mixing = torch.randn(2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    first, second, third = factors
    other = [
        LowRank(first.up * 1e3, first.down / 1e3),
        LowRank(second.up @ mixing, torch.linalg.solve(mixing, second.down)),
        LowRank(torch.cat([third.up, third.up], dim=1), torch.cat([third.down, third.down]) / 2),
    ]
    assert error(method.merge(other), method.merge(factors)) < 1e-11


@pytest.mark.parametrize("method", [TIES(1.0, space="core"), DARETIES(1.0, space="core")], ids=repr)
def test_one_task_with_everything_kept_is_returned(method: Method):
    (delta,) = low_rank((30, 42), (4,))
    merged = method.merge_low_rank([delta])
    assert merged.rank == 4
    assert error(merged.dense(), delta.dense()) < 1e-13


@pytest.mark.parametrize("method", CORE, ids=repr)
def test_no_deltas_give_none(method: Method):
    zeros = [LowRank(torch.zeros(6, 2), torch.ones(2, 5)), LowRank(torch.zeros(6, 0), torch.zeros(0, 5))]
    assert method.merge(zeros).tolist() == torch.zeros(6, 5).tolist()
    assert method.merge_low_rank(zeros).shape == (6, 5)
    assert not method.calibrate(lambda: [zeros]).merge(zeros).any()


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e-30), (torch.float32, 1e36), (torch.float64, 1e-290),
                                             (torch.float64, 1e290)], ids=str)  # fmt: skip
def test_deltas_of_any_size(dtype, size):
    factors = low_rank((12, 20), (2, 3, 4))
    method = TIES(0.3, space="core")
    large = [LowRank((delta.up * size).to(dtype), delta.down.to(dtype)) for delta in factors]
    unit = products([LowRank(delta.up.double() / size, delta.down) for delta in large])
    expected = reference.core_ties(unit, density=0.3)
    for ready in (method, method.calibrate(lambda: [large])):
        assert error(ready.merge(large).double() / size, expected) < (2e-6 if dtype == torch.float32 else 1e-11)


def test_a_task_takes_part_whatever_its_size():
    """Its core is trimmed by its own threshold, and its directions are told from rounding noise."""
    factors = low_rank((30, 42), (4, 2, 3))
    factors[1] = LowRank(factors[1].up * 1e-9, factors[1].down)
    merged = TIES(0.5, space="core").merge(factors)
    assert error(merged, reference.core_ties(products(factors), density=0.5)) < 1e-10


class TestThresholdOfTheWholeModel:
    model = (low_rank((30, 42), (4, 2, 3)), low_rank((12, 9), (2, 2, 2), seed=1), low_rank((20, 20), (1, 5, 3), seed=2))

    def test_it_is_over_the_cores_of_all_parameters(self, device):
        coefficients = [1.0, 0.5, 2.0]
        model = [on(device, factors) for factors in self.model]
        ready = TIES(0.3, space="core").calibrate(lambda: iter(model))
        spaces = [reference.cores(products(factors)) for factors in self.model]
        expected = reference.ties_between_bases(spaces, coefficients, 0.3)
        found = [ready.merge_low_rank(factors, coefficients).dense().cpu() for factors in model]
        for merged, plain in zip(found, expected, strict=True):
            assert error(merged, plain) < 1e-11
        alone = [TIES(0.3, space="core").merge(factors, coefficients) for factors in self.model]
        assert any(error(merged, plain) > 0.01 for merged, plain in zip(alone, expected, strict=True))

    def test_ranks_sum_what_they_count(self):
        """A rank that counts nothing itself gets the thresholds by what the other one adds."""
        counted: list[Tensor] = []

        def keep(histogram: Tensor) -> Tensor:
            counted.append(histogram.clone())
            return histogram

        whole = TIES(0.3, space="core").calibrate(lambda: iter(self.model), reduce=keep)
        others = iter(counted)
        idle = TIES(0.3, space="core").calibrate(lambda: iter(()), reduce=lambda mine: mine + next(others), num_tasks=3)
        assert idle.thresholds == whole.thresholds
        assert next(others, None) is None

    def test_a_number_of_tasks_is_held(self):
        ready = TIES(space="core").calibrate(lambda: iter(self.model))
        with pytest.raises(ValueError, match="TIES was calibrated on 3 tasks, got 2 deltas"):
            ready.merge(self.model[0][:2])

    def test_svc_hands_on_a_calibrated_method(self):
        """At another size, too: the thresholds are not those of scaled deltas."""
        for size in (1.0, 2.0**60):
            model = [[LowRank(delta.up * size, delta.down) for delta in factors] for factors in self.model]
            ready = SVC(TIES(0.3, space="core")).calibrate(lambda model=model: iter(model))
            inner = ready.method.merge(model[1])
            expected = reference.svc([delta / size for delta in products(model[1])], inner / size)
            assert error(ready.merge_low_rank(model[1]).dense() / size, expected) < 1e-9


class TestDraws:
    factors = low_rank((30, 42), (4, 2, 3))

    def test_entries_of_the_core_are_dropped_and_the_rest_is_rescaled(self, device):
        """In the order of the core's rows, by the draws that a tensor of its shape gets from the same key."""
        delta = self.factors[0]
        merged = DARETIES(0.5, seed=3, space="core").keyed(["task/weight"]).merge(on(device, [delta])).cpu()
        U, (core,), Vh = reference.cores([delta.dense()])
        kept = DARETIES(0.5, seed=3).keyed(["task/weight"]).merge([torch.ones(core.shape)]) > 0
        assert 0 < int(kept.sum()) < kept.numel()
        assert error(merged, U @ torch.where(kept, 2 * core, 0.0) @ Vh) < 1e-11

    def test_the_vote_is_that_of_ties(self):
        merged = DARETIES(1.0, scale=0.7, space="core").merge(self.factors, [1.0, 0.5, 2.0])
        expected = reference.core_ties(products(self.factors), [1.0, 0.5, 2.0], 1.0, 0.7)
        assert error(merged, expected) < 1e-11

    def test_seed_and_keys_decide(self):
        keys, method = ["x/w", "y/w", "z/w"], DARETIES(0.5, seed=3, space="core")
        first = method.keyed(keys).merge(self.factors)
        turned = method.keyed([keys[2], *keys[:2]]).merge([self.factors[2], *self.factors[:2]])
        assert error(turned, first) < 1e-12, "the order of tasks makes no difference"
        assert torch.equal(method.keyed(keys).merge(self.factors), first)
        assert error(method.keyed(["x/v", "y/v", "z/v"]).merge(self.factors), first) > 0.01
        assert error(DARETIES(0.5, seed=4, space="core").keyed(keys).merge(self.factors), first) > 0.01


@pytest.mark.parametrize("method", CORE, ids=repr)
def test_what_the_method_says_of_itself(method: Method):
    assert method.supports_low_rank
    assert not method.elementwise
    assert not method.works_in_pieces
    assert method.hyperparameters()["space"] == "core"
    assert type(method)(**method.hyperparameters()) == method
    assert method != type(method)(**{**method.hyperparameters(), "space": "entries"})
    shape, ranks = (4096, 4096), 8 * 16
    entries = type(method)(**{**method.hyperparameters(), "space": "entries"})
    assert entries.cost(shape, 8) == Average().cost(shape, 8)
    assert method.cost(shape, 8, ranks) > Average().cost(shape, 8, ranks)


@pytest.mark.parametrize("method", CORE, ids=repr)
def test_dense_deltas_are_refused(method: Method):
    factors = low_rank((12, 20), (2, 3))
    mixed = [factors[0], factors[1].dense()]
    name = type(method).__name__
    sentence = rf"^{name}: core space needs low-rank deltas, such as LoRA's, but those of tasks \[1\] are dense$"
    with pytest.raises(ValueError, match=sentence):
        method.merge(mixed)
    with pytest.raises(ValueError, match=sentence):
        method.merge_low_rank(mixed)
    with pytest.raises(ValueError, match=sentence.replace(name, "SVC")):
        SVC(method).merge(mixed)
    if method == TIES(0.3, space="core"):
        with pytest.raises(ValueError, match=sentence):
            method.calibrate(lambda: [mixed])
    with pytest.raises(ValueError, match=f"{name} merges matrices only"):
        method.merge([torch.ones(3)])


@pytest.mark.parametrize("kind", [TIES, DARETIES])
def test_mistakes(kind: type[Method]):
    with pytest.raises(
        ValueError, match=r"density must be .* got 2; space must be one of 'entries', 'core', got 'cor'"
    ):
        kind(density=2, space="cor")


@pytest.mark.parametrize("method", CORE, ids=repr)
def test_core_space_commutes_with_all_rotations_and_scales(method: Method):
    factors = low_rank((30, 42), (4, 2, 3))
    g = torch.Generator().manual_seed(5)
    Q, W = (torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0] for n in (30, 42))
    merged = method.merge(factors)
    turned = method.merge([LowRank(Q @ delta.up, delta.down @ W) for delta in factors])
    assert error(Q.T @ turned @ W.T, merged) < 1e-11
    assert error(method.merge(factors, [-0.7] * 3), -0.7 * merged) < 1e-12
    assert error(method.merge([LowRank(-3 * delta.up, delta.down) for delta in factors]), -3 * merged) < 1e-12
