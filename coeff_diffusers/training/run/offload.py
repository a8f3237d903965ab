"""The frozen denoiser's blocks in the CPU's memory, each on the device while it computes: `--group_offload`.

diffusers' own group offloading takes a block away after its forward pass, before its backward pass has used it. Here
a block's activations are computed again in the backward pass, so that each pass brings its own weights. They are read
only: what comes back is the copy that stayed behind, and nothing is copied from the device.
"""

from __future__ import annotations

import functools
import importlib
from collections import deque
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils import checkpoint
from torch.utils._python_dispatch import is_traceable_wrapper_subclass, transform_subclass

from ...quantization import quantization_of
from ..errors import InputError

NOTHING_ON_CPU = "--group_offload saves nothing here: a CPU has the whole model in its memory."
Copies = dict[tuple[nn.Module, str], Any]  # module and name of a parameter -> it, on the device


def offloadable_blocks(denoiser: nn.Module) -> list[nn.Module]:
    """The blocks that a denoiser repeats, as diffusers names them; the innermost, for a UNet has blocks in blocks."""
    names = (getattr(denoiser, attribute, None) or () for attribute in ("_repeated_blocks", "_no_split_modules"))
    kinds = {*chain(*names)}
    items = (module for path, module in denoiser.named_modules() if path.split(".")[-1].isdigit())
    found = dict.fromkeys(module for module in items if type(module).__name__ in kinds)
    return [block for block in found if not any(part in found for part in block.modules() if part is not block)]


def offload_blocks(denoiser: nn.Module, accelerator: Accelerator) -> None:
    """Has a denoiser keep its blocks in the CPU's memory, all else on the accelerator's device.

    Args:
        denoiser: frozen, with nothing trained on it.
        accelerator: of the run.

    Raises:
        InputError: if that cannot be had.
    """
    if accelerator.device.type == "cpu":
        accelerator.print(NOTHING_ON_CPU)
    try:
        GroupOffload(denoiser, accelerator.device)
    except ValueError as error:
        raise InputError(f"--group_offload: {error}; take --gradient_checkpointing in its place") from error


def check_movable(method: str | None) -> None:
    """Raises ValueError if weights that are quantised so, as `quantization_of` says, cannot be offloaded."""
    if method == "bnb_int8":
        raise ValueError("bitsandbytes holds weights of 8 bits beside the layers' own, where they cannot be moved")


class GroupOffload:
    """Keeps the frozen parameters of a denoiser's blocks in the CPU's memory, and brings a block for each pass.

    While a block computes, the next is on its way: the one that came after these two the last time. So there are two
    or three blocks on the device at a time.

    Args:
        denoiser: on the CPU or on the device; all of it but the blocks' frozen parameters is put on the device. What
            is put on later, such as adapters, stays where it is put.
        device: that computes.

    Raises:
        ValueError: if the denoiser has no blocks that are known, or its weights cannot be moved.
    """

    def __init__(self, denoiser: nn.Module, device: torch.device) -> None:
        blocks = offloadable_blocks(denoiser)
        if not blocks:
            raise ValueError(f"a {type(denoiser).__name__} has no blocks that are known to be repeated")
        check_movable(quantization_of(denoiser))
        self._device = device
        self._home = {block: _frozen_parameters(block) for block in blocks}
        for parameters in self._home.values():
            _to_host(parameters, pin=device.type == "cuda")
        kept = {id(parameter) for parameters in self._home.values() for parameter in parameters.values()}
        _to_device(denoiser, kept, device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: dict[nn.Module, Copies] = {}
        self._last: tuple[nn.Module | None, nn.Module | None] = (None, None)
        self._next: dict[tuple[nn.Module | None, nn.Module | None], nn.Module] = {}
        self._done: deque[Any] = deque()
        if quantization_of(denoiser) == "bnb_nf4":
            _let_bitsandbytes_go()
        for block in blocks:
            block.forward = self._brought(block)

    def _brought(self, block: Any) -> Any:
        """The block's forward pass, with its weights on the device."""
        forward = block.forward

        def compute(*args: Any, **kwargs: Any) -> Any:
            self._bring(block)
            try:
                return forward(*args, **kwargs)
            finally:  # after what ends a second forward pass early, too
                self._send(block)

        @functools.wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return compute(*args, **kwargs)
            names, count = list(kwargs), len(args)

            def by_place(*given: Any) -> Any:  # what is kept of a keyword is out of reach for --offload_activations
                return compute(*given[:count], **dict(zip(names, given[count:])))

            return checkpoint.checkpoint(by_place, *args, *kwargs.values(), use_reentrant=False)

        return call

    def _bring(self, block: nn.Module) -> None:
        copies = self._ahead.pop(block, None) or self._copied(block)
        if self._stream is not None:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_stream(self._stream)
            for each in copies.values():
                for part in _parts(each):  # the backward pass lets go of it while it still computes with it
                    part.record_stream(computing)
        for (module, name), parameter in copies.items():
            module._parameters[name] = parameter
        before, self._last = self._last, (self._last[1], block)
        self._next[before] = block
        if self._stream is not None:
            self._ahead = {}  # what did not come
            following = self._next.get(self._last)
            if following is not None and following is not block:
                self._ahead[following] = self._copied(following)

    def _copied(self, block: nn.Module) -> Copies:
        with torch.cuda.stream(self._stream):  # nothing without one
            return {place: _copy(parameter, self._device) for place, parameter in self._home[block].items()}

    def _send(self, block: nn.Module) -> None:
        for (module, name), parameter in self._home[block].items():
            module._parameters[name] = parameter
        if self._stream is not None:  # lest blocks be brought faster than they compute
            self._done.append(torch.cuda.current_stream(self._device).record_event())
            if len(self._done) > 1:
                self._done.popleft().synchronize()


def _let_bitsandbytes_go() -> None:
    """Has its layers of 4 bits save their weights as torch's own do.

    They keep them in the node of the graph, out of reach of checkpointing, and for as long as the graph lives: all
    that were brought would stay.
    """
    functions: Any = importlib.import_module("bitsandbytes.autograd._functions")
    own = functions.MatMul4Bit
    if getattr(own, "lets_go", False):
        return

    class MatMul4Bit(own):  # type: ignore[misc, valid-type]
        lets_go = True

        @staticmethod
        def forward(ctx: Any, A: Any, B: Any, *args: Any) -> Any:
            output = own.forward(ctx, A, B, *args)
            if getattr(ctx, "tensors", (None, None))[1] is not None:  # there are none of empty inputs
                ctx.tensors = None
                ctx.save_for_backward(B)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            if saved := ctx.saved_tensors:  # asked for once: checkpointing gives them once
                ctx.tensors = (None, *saved)
            try:
                return own.backward(ctx, *gradients)
            finally:
                ctx.tensors = None

    functions.MatMul4Bit = MatMul4Bit


def _frozen_parameters(block: nn.Module) -> Copies:
    return {
        (module, name): parameter
        for module in block.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and not parameter.requires_grad
    }


def _to_host(parameters: Copies, pin: bool) -> None:
    """Into the CPU's memory, pinned, so that they can be copied while others compute."""
    for (module, name), parameter in parameters.items():
        kept = parameter.cpu()
        if pin and is_traceable_wrapper_subclass(kept):
            kept = transform_subclass(kept, lambda _, part: part.pin_memory())
        elif pin:
            kept.data = kept.data.pin_memory()
        parameters[module, name] = module._parameters[name] = _as_parameter(kept)


def _copy(parameter: Any, device: torch.device) -> Any:
    if is_traceable_wrapper_subclass(parameter):  # torchao's own `to` waits for the copy
        return transform_subclass(parameter, lambda _, part: part.to(device, non_blocking=True))
    return parameter.to(device, non_blocking=True)


def _as_parameter(tensor: Any) -> Any:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)


def _parts(tensor: Any) -> Iterator[torch.Tensor]:
    """The plain tensors that one of torchao or quanto is made of, which know no `record_stream`; or itself."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _parts(getattr(tensor, name))


def _to_device(denoiser: nn.Module, kept: set[int], device: torch.device) -> None:
    """All parameters and buffers but those kept."""
    moved: dict[int, Any] = {}  # a parameter may be in several places
    for module in denoiser.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in kept:
                continue
            if parameter.requires_grad:  # it stays the one that its optimizer has
                parameter.data = parameter.data.to(device)
            else:  # of another type of tensor than plain ones, `data` leaves the parts where they are
                if id(parameter) not in moved:
                    moved[id(parameter)] = parameter, _as_parameter(_copy(parameter, device))
                module._parameters[name] = moved[id(parameter)][1]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
