"""What is kept on a GPU beside training, by the numbers that its driver and its allocator give.

Where there is no GPU, PyTorch's fake tensors stand in for tensors on one: they have its device, and no values.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from helpers.devices import needs_gpu
from helpers.tiny import VectorTask
from lightning_drm import MergeSession
from lightning_drm.distributed.ranks import ALONE
from lightning_drm.fusion import device_memory
from lightning_drm.fusion.device_memory import DeviceMemory, bytes_beside_training, free_bytes
from lightning_drm.merging import LowRank
from lightning_drm.training.delta_cache import DeltaCache, Store
from lightning_drm.training.room import home_of_merged

CUDA = torch.device("cuda", 0)
GB = 10**9


@pytest.mark.parametrize(
    ("memory", "available", "beside_training"),
    [
        (DeviceMemory(free=80 * GB, reserved=0, allocated=0, peak=0), 80 * GB, 80 * GB),
        # After a training: the driver has next to nothing, the allocator keeps what activations took.
        (DeviceMemory(free=1 * GB, reserved=79 * GB, allocated=64 * GB, peak=72 * GB), 16 * GB, 8 * GB),
        # Another process has most of the device, and training needed all that was left.
        (DeviceMemory(free=0, reserved=20 * GB, allocated=5 * GB, peak=20 * GB), 15 * GB, 0),
        # The allocator has given back since, and another process has taken it.
        (DeviceMemory(free=2 * GB, reserved=6 * GB, allocated=5 * GB, peak=30 * GB), 3 * GB, 0),
    ],
)
def test_what_is_free(memory: DeviceMemory, available: int, beside_training: int):
    assert (memory.available, memory.beside_training) == (available, beside_training)


class Says:
    """A GPU's numbers, as long as a test lasts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch

    def __call__(self, free: int, reserved: int = 0, allocated: int = 0, peak: int = 0) -> None:
        found = DeviceMemory(free, reserved, allocated, peak)
        self._patch.setattr(device_memory.DeviceMemory, "of", lambda device: found)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Says]:
    with FakeTensorMode():
        yield Says(monkeypatch)


def places(store: Store, num_tensors: int = 4) -> list[str]:
    """Where deltas of 4000 bytes each stay."""
    cache = DeltaCache(store, None, {str(name): 0 for name in range(num_tensors)}, ALONE)
    deltas = [torch.empty(10, 100, device=CUDA) for _ in range(num_tensors)]
    return [cache.place(str(name), delta).device.type for name, delta in enumerate(deltas)]


def test_deltas_stay_on_the_device_as_far_as_training_leaves_room(gpu: Says):
    gpu(free=1000, reserved=50_000, allocated=20_000, peak=42_000)
    assert places("auto") == ["cuda", "cuda", "cpu", "cpu"]
    gpu(free=0, reserved=50_000, allocated=20_000, peak=50_000)
    assert places("auto") == ["cpu"] * 4
    assert places("device") == ["cuda"] * 4
    gpu(free=10**9)
    assert places("auto") == ["cuda"] * 4
    assert places("cpu") == ["cpu"] * 4


def test_a_small_delta_stays_after_one_that_had_no_room(gpu: Says):
    gpu(free=5000)
    cache = DeltaCache("auto", None, dict.fromkeys("abc", 0), ALONE)
    large, factors = torch.empty(2000, device=CUDA), LowRank(*(torch.empty(s, device=CUDA) for s in ((9, 1), (1, 9))))
    assert cache.place("a", large).device.type == "cpu"
    assert cache.place("b", factors).device.type == "cuda"
    assert cache.place("c", torch.empty(1240, device=CUDA)).device.type == "cpu"  # 72 bytes are taken


def base_of(num_values: int) -> dict[str, Tensor]:
    """Six bytes for each value."""
    return {"weight": torch.empty(num_values), "table": torch.empty(num_values, dtype=torch.bfloat16)}


def test_the_merged_model_is_built_where_it_has_room(gpu: Says):
    gpu(free=1000, reserved=10_000, allocated=3000)
    assert home_of_merged(CUDA, base_of(1000), 2000, ALONE) == CUDA
    with pytest.warns(UserWarning, match="is built in host memory"):
        assert home_of_merged(CUDA, base_of(1000), 2001, ALONE).type == "cpu"


def test_the_merged_model_is_built_in_host_memory_where_it_has_none(gpu: Says):
    gpu(free=1 * GB, reserved=79 * GB, allocated=64 * GB)
    base = {"weight": torch.empty(8_030_261_248, dtype=torch.bfloat16, device=CUDA)}
    said = r"in host memory: on cuda:0, 16.0 GB are free, and it takes 16.1 GB beside the 2.0 GB of merging"
    with pytest.warns(UserWarning, match=said):
        assert home_of_merged(CUDA, base, 2 * GB, ALONE).type == "cpu"
    assert home_of_merged(torch.device("cpu"), base, 2 * GB, ALONE).type == "cpu", "without a warning"


@pytest.mark.gpu
@needs_gpu
def test_what_the_allocator_has_kept_is_free():
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = free_bytes(CUDA)
    tensor = torch.empty(256 << 20, dtype=torch.uint8, device=CUDA)
    assert abs(before - free_bytes(CUDA) - tensor.nbytes) < 32 << 20
    beside = bytes_beside_training(CUDA)
    del tensor
    assert abs(before - free_bytes(CUDA)) < 32 << 20
    assert torch.cuda.mem_get_info(CUDA)[0] < before - (200 << 20), "the driver knows nothing of it"
    assert abs(bytes_beside_training(CUDA) - beside) < 32 << 20, "it is kept for the next training"


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("free", [0, 10 * GB])
def test_a_session_builds_it_there(free: int, monkeypatch: pytest.MonkeyPatch):
    session = MergeSession(["a", "b"], store="device")
    for task in session.tasks:
        module = VectorTask().cuda()
        session.note_base(module, task)
        for parameter in module.parameters():
            parameter.data.add_(torch.randn_like(parameter))
        session.collect(module, task)
    expected = session.fuse().state_dict()
    monkeypatch.setattr(device_memory.DeviceMemory, "of", lambda device: DeviceMemory(free, 0, 0, 0))
    merged = session.fuse()
    assert {parameter.device.type for parameter in merged.parameters()} == {"cuda" if free else "cpu"}
    assert all(torch.equal(tensor.cpu(), expected[name].cpu()) for name, tensor in merged.state_dict().items())
