"""Interrupted at any line, what changes a model leaves it as it was, or is through."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from hosts import HOSTS, visible
from test_per_sample import with_adapters
from torch import nn

import coeff_diffusers
from coeff_diffusers import (
    CoeffConfig,
    add_coeff_adapter,
    coeff_adapters,
    coeff_disabled,
    coeff_parameters,
    coeff_per_sample,
    coeff_state_dict,
    delete_coeff_adapters,
    disable_coeff_adapters,
    get_active_coeff_adapters,
    list_coeff_adapters,
    load_coeff_weights,
    set_coeff_adapters,
    unload_coeff_weights,
)
from coeff_diffusers.adapters import walk_layers
from coeff_diffusers.guard import put_on
from coeff_diffusers.layers import attention_layers

FOLDER = str(Path(coeff_diffusers.__file__).parent)
POINTS = 25  # of each change


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return coeff_state_dict(with_adapters(HOSTS["unet"].build(), ["new"]), "new")


def enter(context: Any) -> None:
    with context:
        pass


CHANGES: dict[str, Callable[[nn.Module, dict[str, torch.Tensor]], Any]] = {
    "attach": lambda unet, _: add_coeff_adapter(unet, adapter_name="new"),
    "load": lambda unet, state: load_coeff_weights(unet, state, adapter_name="new"),
    "hotswap": lambda unet, state: load_coeff_weights(unet, state, adapter_name="dog", hotswap=True),
    "set": lambda unet, _: set_coeff_adapters(unet, ["dog", "cat"], [0.5, 2.0]),
    "disable": lambda unet, _: disable_coeff_adapters(unet),
    "delete": lambda unet, _: delete_coeff_adapters(unet, "dog"),
    "unload": lambda unet, _: unload_coeff_weights(unet),
    "coeff_adapters": lambda unet, _: enter(coeff_adapters(unet, "dog", 0.3)),
    "coeff_disabled": lambda unet, _: enter(coeff_disabled(unet)),
    "coeff_per_sample": lambda unet, _: enter(coeff_per_sample(unet, ["dog", "cat"])),
}


def model(kind: str) -> nn.Module:
    """Without coefficients; with those of files, "dog" on some layers and "cat" on others; or with parameters."""
    torch.manual_seed(0)
    unet = visible(HOSTS["unet"].build().eval())
    if kind != "bare":
        add_coeff_adapter(unet, CoeffConfig(kinds=("cross",)), adapter_name="cat")
        add_coeff_adapter(unet, adapter_name="dog")
        source = coeff_state_dict(unet, "dog")
        delete_coeff_adapters(unet, "dog")
        load_coeff_weights(unet, source, adapter_name="dog")
        with torch.no_grad():
            for seed, parameter in enumerate(coeff_parameters(unet, "cat")):
                parameter.normal_(generator=torch.Generator().manual_seed(seed))
        set_coeff_adapters(unet, "cat", 0.7)
        if kind == "parameters":
            coeff_parameters(unet)
    return unet


def facts(unet: nn.Module) -> dict[str, Any]:
    """All of the model that a change could have touched."""
    names = list_coeff_adapters(unet)
    layers = attention_layers(unet)
    held, lost = walk_layers(unet)
    return {
        "lost": list(lost),
        "held": list(held),
        "names": names,
        "active": get_active_coeff_adapters(unet),
        "values": [value.tolist() for name in names for value in coeff_state_dict(unet, name).values()],
        "processors": [id(getattr(layer.processor, "processor", layer.processor)) for layer in layers.values()],
        "hooks": [len(module._forward_pre_hooks) + len(module._state_dict_pre_hooks) for module in unet.modules()],
        "enabled": [layer.processor.enabled for layer in held.values()],
    }


def interrupted(change: Callable[[], Any], at: int, error: type[BaseException]) -> tuple[bool, int]:
    """Whether the change was interrupted before its `at`th line of this package, and how many lines it ran."""
    lines = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        if not frame.f_code.co_filename.startswith(FOLDER):
            return None
        if event == "line":
            lines += 1
            if lines == at:
                raise error
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        change()
    except error:
        return True, lines
    finally:
        sys.settrace(before)
    return False, lines


CASES = [("attach", "bare"), ("load", "bare"), *((name, kind) for name in CHANGES for kind in ("files", "parameters"))]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_an_interruption_leaves_all_or_nothing(name, kind, state) -> None:
    unet = model(kind)
    change = CHANGES[name]
    _, lines = interrupted(partial(change, unet, state), -1, KeyboardInterrupt)
    through = facts(unet)
    unet = model(kind)
    before = facts(unet)
    for point in range(POINTS):
        at = 1 + lines * point // POINTS
        stopped, _ = interrupted(partial(change, unet, state), at, KeyboardInterrupt)
        assert stopped, at
        after = facts(unet)
        same = {fact for fact in before if after[fact] == before[fact]}
        done = {fact for fact in before if after[fact] == through[fact] or fact == "processors"}  # another model's
        assert same == set(before) or done == set(before), (at, set(before) - same)
        if same != set(before):
            unet = model(kind)
            before = facts(unet)
    change(unet, state)  # and it can be made after all
    assert facts(unet)["names"] == through["names"]


def test_an_error_at_the_fourth_layer_leaves_none(unet, state, monkeypatch) -> None:
    before, layers = facts(unet), []

    def fourth(*args: Any) -> None:
        layers.append(args)
        if len(layers) == 4:
            raise MemoryError
        put_on(*args)

    monkeypatch.setattr("coeff_diffusers.adapters.put_on", fourth)
    for change in ("attach", "load"):
        layers.clear()
        with pytest.raises(MemoryError):
            CHANGES[change](unet, state)
        assert facts(unet) == before
