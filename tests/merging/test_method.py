"""What every method offers besides merging: names, equality, reuse, calibration, keyed draws."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Thread

import pytest
import torch

from helpers import ties
from helpers.devices import on
from lightning_drm import merging
from lightning_drm.merging import DARETIES, DRM, TIES, TSVM, Average, IsoC, IsoCTS, KnOTS, LowRank, TaskArithmetic
from lightning_drm.merging import METHODS as KINDS

METHODS = [kind() for kind in KINDS]


def deltas(*shape, num_tasks=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g) for _ in range(num_tasks)]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_hyperparameters_rebuild_the_method(method):
    again = type(method)(**method.hyperparameters())
    assert again == method
    assert hash(again) == hash(method)
    assert eval(repr(method), vars(merging)) == method
    assert isinstance(method.scale, float)


def test_methods_differ_by_parameters_and_class():
    assert DRM() != DRM(density=0.3)
    assert IsoC() != TSVM()
    assert TIES() != TIES().calibrate(lambda: [deltas(4)])


@pytest.mark.parametrize("method", [TaskArithmetic(0.3), Average(), TIES(0.4), DARETIES(0.5, seed=2)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_pieces_are_parts_of_the_whole(method, dtype, device):
    values = [delta.to(device, dtype) for delta in deltas(1003, num_tasks=3)]
    method = method.calibrate(lambda: [values])
    assert method.works_in_pieces
    keys, coefficients = ["a", "b", "c"], [1.0, 0.5, 2.0]
    whole = method.keyed(keys).merge(values, coefficients)
    for start, stop in ((0, 8), (8, 520), (520, 1003)):
        part = [delta[start:stop] for delta in values]
        merged = method.keyed(keys, start=start).merge(part, coefficients)
        assert torch.equal(merged, whole[start:stop])


@pytest.mark.parametrize(
    "method",
    [DRM(), TIES(0.4, "tensor"), TIES(space="core"), DARETIES(space="core"), IsoC(), IsoCTS(), TSVM(), KnOTS()],
    ids=repr,
)
def test_methods_that_see_a_whole_parameter_say_so(method):
    assert not method.works_in_pieces


def test_defaults_do_nothing():
    for method in (DRM(), TaskArithmetic(), TIES(scope="tensor")):
        assert method.calibrate(lambda: [deltas(4)]) is method
        assert method.keyed(["a"]) is method


@pytest.mark.parametrize("method", [TIES(), DARETIES()], ids=repr)
def test_elementwise_methods_refuse_factors_for_factors(method):
    delta = LowRank(torch.ones(3, 1), torch.ones(1, 3))
    assert not method.supports_low_rank
    with pytest.raises(ValueError, match=f"{type(method).__name__} has no low-rank result.*use merge"):
        method.merge_low_rank([delta])
    assert method.merge([delta]).shape == (3, 3)


def test_merge_low_rank_names_the_dense_tasks():
    with pytest.raises(ValueError, match=r"dense of tasks \[1\]"):
        IsoC().merge_low_rank([LowRank(torch.ones(3, 1), torch.ones(1, 3)), torch.ones(3, 3)])


class TestReuse:
    @pytest.mark.parametrize("direction", ["horizontal", "vertical"])
    @pytest.mark.parametrize(
        "switches",
        [
            {"density": 0.5},
            {"renormalize": False},
            {"prune": "individual", "density": 0.6},
            {"elect_sign": False, "disjoint": False, "scale": 0.3},
        ],
    )
    def test_one_basis_serves_every_setting(self, direction, switches, device):
        inputs = on(device, deltas(20, 30))
        basis = DRM(direction).prepare(inputs)
        method = DRM(direction, **switches)
        merged = method.merge_prepared(basis, [1.0, 0.5, 2.0]).dense()
        torch.testing.assert_close(merged, method.merge(inputs, [1.0, 0.5, 2.0]), rtol=0, atol=0)

    def test_a_setting_does_not_change_the_basis(self):
        basis = DRM().prepare(deltas(12, 9))
        first = DRM(renormalize=False).merge_prepared(basis).dense()
        DRM(density=0.9).merge_prepared(basis)
        assert torch.equal(first, DRM(renormalize=False).merge_prepared(basis).dense())

    def test_a_basis_of_another_decomposition_is_refused(self):
        basis = DRM().prepare(deltas(12, 9))
        with pytest.raises(ValueError, match=r"direction is 'vertical'.*rank_tol is 0.1"):
            DRM("vertical", rank_tol=0.1).merge_prepared(basis)
        with pytest.raises(ValueError, match="need 3 coefficients"):
            DRM().merge_prepared(basis, [1.0])


class TestTIESCalibration:
    model = (deltas(6, 5), deltas(11, seed=1), deltas(3, 4, 2, seed=2))

    def whole(self):
        return [torch.cat([parameter[task].flatten() for parameter in self.model]) for task in range(3)]

    def test_thresholds_are_those_of_the_flattened_model(self, device):
        calls = []

        def stream():
            calls.append(1)
            return iter(model)

        model = [on(device, parameter) for parameter in self.model]
        method = TIES(0.3).calibrate(stream)
        expected = TIES(0.3, "tensor").merge(self.whole())
        merged = torch.cat([method.merge(parameter).flatten().cpu() for parameter in model])
        assert torch.equal(merged, expected)
        assert len(calls) <= 3

    def test_ranks_that_see_a_share_each_agree(self):
        """Two ranks in lockstep: each reduce waits for the other's histogram, one rank has nothing at all at first."""
        barrier, seen, found = Barrier(3), {}, {}

        def rank(number, share):
            def reduce(histogram):
                seen[number] = histogram
                barrier.wait()
                total = sum(seen.values())
                barrier.wait()
                return total

            found[number] = TIES(0.3).calibrate(lambda: iter(share), reduce=reduce, num_tasks=3).thresholds

        shares = [self.model[:2], self.model[2:], []]
        threads = [Thread(target=rank, args=item) for item in enumerate(shares)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found[0] == found[1] == found[2] == TIES(0.3).calibrate(lambda: iter(self.model)).thresholds

    def test_mixed_precision_and_factors(self, device):
        factor = LowRank(torch.ones(2, 1), torch.tensor([[0.5, 2.0]]))
        model = [[factor, torch.ones(2, 2).bfloat16()], [deltas(7)[0].double(), deltas(7)[1]]]
        method = TIES(0.5).calibrate(lambda: (on(device, deltas) for deltas in model))
        values = [factor.dense().flatten().double(), model[1][0]]
        kept = torch.cat(values).abs().sort().values[11 - round(11 * 0.5) - 1]
        assert method.thresholds[0] == kept

    def test_number_of_tasks_is_checked(self):
        method = TIES().calibrate(lambda: iter(self.model))
        with pytest.raises(ValueError, match="calibrated on 3 tasks, got 2 deltas"):
            method.merge(deltas(6, 5, num_tasks=2))

    def test_bad_values_are_refused(self):
        with pytest.raises(ValueError, match="task 1 holds NaN"):
            TIES().calibrate(lambda: [[torch.ones(3), torch.full((3,), float("nan"))]])

    def test_calibrated_thresholds_survive_a_copy_of_density_one(self):
        method = TIES(1.0).calibrate(lambda: iter(self.model))
        assert method.thresholds == (0.0, 0.0, 0.0)
        torch.testing.assert_close(method.merge(self.model[0]), TIES(1.0).merge(self.model[0]))


class TestDARETIES:
    def test_draws_depend_on_seed_and_key_only(self, device):
        a, b, c = on(device, deltas(40, 50))
        method = DARETIES(seed=3)
        both = method.keyed(["x/w", "y/w", "z/w"]).merge([a, b, c])
        assert torch.equal(both, method.keyed(["x/w", "y/w", "z/w"]).merge([a, b, c]))
        torch.testing.assert_close(both, method.keyed(["z/w", "x/w", "y/w"]).merge([c, a, b]))
        assert not torch.equal(both, method.keyed(["x/v", "y/v", "z/v"]).merge([a, b, c]))
        assert not torch.equal(both, DARETIES(seed=4).keyed(["x/w", "y/w", "z/w"]).merge([a, b, c]))

    def test_draws_do_not_depend_on_the_other_tasks(self):
        delta = torch.ones(700, 301)
        alone = DARETIES().keyed(["x"]).merge([delta])
        zeros = torch.zeros_like(delta)
        assert torch.equal(alone, DARETIES().keyed(["y", "x", "z"]).merge([zeros, delta, zeros]))

    def test_default_keys_are_positions(self):
        inputs = deltas(9, 9)
        assert torch.equal(DARETIES().merge(inputs), DARETIES().keyed(["0", "1", "2"]).merge(inputs))

    def test_global_seed_is_neither_used_nor_changed(self):
        torch.manual_seed(0)
        state = torch.get_rng_state()
        first = DARETIES().merge(deltas(9, 9))
        assert torch.equal(state, torch.get_rng_state())
        torch.manual_seed(1)
        assert torch.equal(first, DARETIES().merge(deltas(9, 9)))

    def test_what_is_kept_and_rescaling(self):
        merged = DARETIES(density=0.25).merge([torch.ones(400, 500)])
        assert set(merged.unique().tolist()) == {0.0, 4.0}
        # Standard deviation of the mean of 200,000 draws at 1/4: 0.001 · 4.
        assert abs(merged.mean().item() - 1.0) < 0.02

    def test_draws_are_the_same_on_every_machine(self, device):
        """The first entries kept for a fixed key: these may never change."""
        kept = DARETIES(density=0.5).keyed(["task/weight"]).merge([torch.ones(16, device=device)]) > 0
        assert kept.int().tolist() == [0, 1, 1, 1, 0, 1, 0, 1, 0, 0, 1, 1, 0, 1, 0, 1]

    def test_number_of_keys_is_checked(self):
        with pytest.raises(ValueError, match="keys for 2 tasks, got 3"):
            DARETIES().keyed(["a", "b"]).merge(deltas(3))


def test_threads_may_merge_at_the_same_time():
    """Nothing is kept between calls, so layers can be spread over threads."""
    layers = [deltas(30 + size, 50, seed=size) for size in range(8)]
    for method in (DRM(), TIES(), DARETIES(1.0), TSVM()):
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(method.merge, layers))
        for layer, merged in zip(layers, together, strict=True):
            torch.testing.assert_close(merged, ties.settled(merged, method.merge(layer), method, layer))
