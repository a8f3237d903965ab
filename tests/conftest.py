"""The hosts as fixtures, and what separates one run of accelerate in this process from the next."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from accelerate.state import AcceleratorState
from hosts import HOSTS, Host, visible
from torch import nn


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps its state for the life of a process, which here has many runs."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


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
