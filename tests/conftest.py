"""The hosts as fixtures, and what makes one run in this process independent of the others, and of the machine."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from hosts import HOSTS, Host, visible
from torch import nn

# A minute or more each: started last, one of them would keep one process busy when all others are through.
SLOWEST = (
    "test_gpu.py", "test_resume.py", "test_generate.py", "test_distributed.py", "test_choice.py", "test_app.py",
    "test_serving.py", "test_subjects.py", "test_training.py", "test_docs.py", "test_scripts.py",
    "test_quantization.py", "test_plan.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For xdist's --dist loadfile, which gives out files in this order."""
    items.sort(key=lambda item: SLOWEST.index(item.path.name) if item.path.name in SLOWEST else len(SLOWEST))


def pytest_collection_finish() -> None:
    """What was imported stays: a run's `gc.collect()` took longer to walk it than its three steps."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps its state for the life of a process, which here has many runs."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Here and in the processes that a test starts, which then round alike.

    Two threads only wait for one another on tensors of this size.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def the_host_s_own_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """`set_attention_backend` of a model is for the whole process."""
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)


@pytest.fixture
def one_process() -> Iterator[None]:
    """A group of this process alone, which can do all that a larger one does."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(params=HOSTS)
def host(request: pytest.FixtureRequest) -> Host:
    return HOSTS[request.param]


@pytest.fixture
def model(host: Host) -> nn.Module:
    torch.manual_seed(0)
    return visible(host.build().eval())


@pytest.fixture
def unet() -> nn.Module:
    torch.manual_seed(0)
    return visible(HOSTS["unet"].build().eval())
