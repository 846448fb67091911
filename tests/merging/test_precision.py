"""A merge computes in IEEE float32, whatever a training has set, and leaves what it found."""

import threading

import pytest
import torch
from torch import Tensor

from helpers.devices import needs_gpu, on
from lightning_drm.merging import DRM, IsoCTS, Method
from merging.test_reference import PAIRS, dense


def chosen() -> list[str]:
    return [torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]


class Spy(Method):
    """Notes the precision in which it is asked to merge, and may fail."""

    elementwise = True
    not_low_rank = "it only looks"

    def __init__(self, meet: threading.Barrier | None = None, fail: bool = False) -> None:
        self.meet, self.fail, self.seen = meet, fail, []

    def _merge(self, deltas: list[Tensor], coefficients: list[float]) -> Tensor:
        for _ in range(2):  # the other thread has entered, and has not left
            self.seen.append(chosen())
            if self.meet is not None:
                self.meet.wait(10)
        if self.fail:
            raise ValueError("as asked")
        return deltas[0]


@pytest.fixture(params=["highest", "high", "medium"])
def setting(request: pytest.FixtureRequest):
    torch.set_float32_matmul_precision(request.param)
    yield chosen()
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("fail", [False, True])
def test_within_it_is_ieee_and_afterwards_what_it_was(setting: list[str], fail: bool):
    spy = Spy(fail=fail)
    try:
        spy.merge([torch.ones(2)])
    except ValueError:
        assert fail
    assert spy.seen == [["ieee", "ieee"]] * 2
    assert chosen() == setting


def test_the_first_of_several_threads_that_is_done_changes_nothing_for_the_others(setting: list[str]):
    spies = [Spy(threading.Barrier(1)), Spy(threading.Barrier(1))]
    spies[0].meet = spies[1].meet = threading.Barrier(2)
    threads = [threading.Thread(target=spy.merge, args=([torch.ones(2)],)) for spy in spies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(spy.seen == [["ieee", "ieee"]] * 2 for spy in spies)
    assert chosen() == setting


@pytest.mark.parametrize("name", PAIRS)
def test_autocast_changes_nothing(name: str, device: torch.device):
    method, deltas = PAIRS[name][0], on(device, dense((12, 20), 3, dtype=torch.float32))
    expected = method.merge(deltas)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(method.merge(deltas), expected)
        assert torch.equal(deltas[0] @ deltas[0].T, (deltas[0] @ deltas[0].T).bfloat16()), "the case shows nothing"


def test_prepared_deltas_are_merged_alike(setting: list[str], device: torch.device):
    deltas = on(device, dense((12, 20), 3, dtype=torch.float32))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        basis = DRM().prepare(deltas)
        merged = DRM().merge_prepared(basis).dense
    assert torch.equal(merged(), DRM().merge(deltas))
    assert chosen() == setting


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("method", [DRM(), IsoCTS()], ids=repr)
def test_tensorfloat32_changes_nothing(method: Method, setting: list[str]):
    deltas = [delta.cuda() for delta in dense((256, 384), 3, dtype=torch.float32)]
    merged = method.merge(deltas)
    torch.set_float32_matmul_precision("highest")
    assert torch.equal(merged, method.merge(deltas))
