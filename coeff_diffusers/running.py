"""The calls of pipelines and models that are running, as the threads' stacks tell them.

Three things are written nowhere else. A denoiser gets a batch of which it cannot be told whether guidance doubled it
or each prompt has two images; a pipeline keeps that in local variables of its `__call__`. Which pipeline calls a model
is known to the pipeline alone. And a call that runs while adapters change must go on with those that it began with:
they are noted in its frame, and gone with it.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch import nn

_NOTES = "<coefficients>"  # no name that a local variable can have
_CALL = re.compile(r"(torch_dynamo_resume_in_)?_call_impl")


def pipeline_calls() -> Iterator[tuple[Any, dict[str, Any]]]:
    """The pipelines that are called in this thread, the innermost first, with their arguments and local variables."""
    for frame in _up(sys._getframe(1)):
        if frame.f_code.co_name == "__call__" and _is_pipeline(caller := frame.f_locals.get("self")):
            yield caller, {**frame.f_locals.get("kwargs", {}), **frame.f_locals}


def other_calls(model: nn.Module | None) -> list[FrameType]:
    """The calls of this model, and of pipelines that have it, in other threads."""
    here = threading.get_ident()
    stacks = [_up(frame) for thread, frame in sys._current_frames().items() if thread != here]
    return [frame for stack in stacks for frame in stack if _is_call(frame, model)]


def calls_here(model: nn.Module | None) -> int:
    """How many calls of this model are running in this thread, one in the other."""
    frames = [frame for frame in _up(sys._getframe(1)) if _CALL.match(frame.f_code.co_name)]
    return sum(frame.f_locals.get("self") is model for frame in frames)


def note(frame: FrameType, key: str, value: Any) -> None:
    """Notes a value in a frame, unless it has one."""
    frame.f_locals.setdefault(_NOTES, {}).setdefault(key, value)


def noted(key: str) -> Any:
    """What is noted in the outermost frame of this thread that has a note; `None` if none has."""
    found = None
    for frame in _up(sys._getframe(1)):
        if frame.f_code.co_name in ("__call__", "_call_impl"):
            found = frame.f_locals.get(_NOTES, {}).get(key, found)
    return found


def note_again(key: str, value: Any) -> None:
    """Replaces what is noted in this thread."""
    for frame in _up(sys._getframe(1)):
        if frame.f_code.co_name in ("__call__", "_call_impl") and key in frame.f_locals.get(_NOTES, {}):
            frame.f_locals[_NOTES][key] = value


def asked(key: str) -> set[str]:
    """What the pipeline's call that is running here has asked the store for, to be added to; empty without one."""
    frames = [frame for frame in _up(sys._getframe(1)) if frame.f_code.co_name == "__call__"]
    outermost = next((frame for frame in reversed(frames) if _is_pipeline(frame.f_locals.get("self"))), None)
    if outermost is None:
        return set()
    names: set[str] = outermost.f_locals.setdefault(_NOTES, {}).setdefault(f"{key} asked", set())
    return names


def _up(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_call(frame: FrameType, model: nn.Module | None) -> bool:
    name = frame.f_code.co_name
    if name not in ("__call__", "_call_impl"):
        return False
    caller = frame.f_locals.get("self")
    if name == "_call_impl":
        return caller is model
    if not _is_pipeline(caller):
        return False
    parts = [part for part in vars(caller).values() if isinstance(part, nn.Module)]
    return any(unwrapped is model for part in parts for unwrapped in (part, getattr(part, "_orig_mod", None)))


def _is_pipeline(caller: Any) -> bool:
    return hasattr(type(caller), "components") and not isinstance(caller, nn.Module)
