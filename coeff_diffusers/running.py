"""The calls of pipelines and models that are running, as the threads' stacks tell them.

Three things are written nowhere else. A denoiser gets a batch of which it cannot be told whether guidance doubled it
or each prompt has two images; a pipeline keeps that in local variables of its `__call__`. Which pipeline calls a model
is known to the pipeline alone. And a call that runs while adapters change must go on with those that it began with: it
has a session, which is held by its frame and gone with it.

The variables of a frame are read in its own thread only: Python 3.11 crashes where another thread runs it meanwhile.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any
from weakref import WeakSet

from torch import nn

_SESSION = "<coefficients>"  # no name that a local variable can have
_CALL = re.compile(r"(torch_dynamo_resume_in_)?_call_impl")


class Session:
    """A call of a pipeline that is running, or of a model alone, from the first forward pass of a record's model on.

    Args:
        frame: the call's.
        models: that take part in it.

    Attributes:
        states: key of a record -> the state that the call goes on with, where another has been put in its place since.
        asked: key of a record -> the adapters that the call has asked the store for.
    """

    def __init__(self, frame: FrameType, models: list[nn.Module]) -> None:
        self.thread, self.frame, self.models = threading.get_ident(), id(frame), models
        self.states: dict[str, Any] = {}
        self.asked: dict[str, set[str]] = {}

    def is_running(self) -> bool:
        """Not so if only a traceback holds the frame."""
        return any(id(frame) == self.frame for frame in _up(sys._current_frames().get(self.thread)))


_sessions: WeakSet[Session] = WeakSet()
_ADDING = threading.Lock()  # for a set that grows cannot be walked


def session() -> Session | None:
    """That of the outermost call in this thread, begun now if it has none; `None` outside of calls."""
    for frame in reversed(_calls(sys._getframe(1))):
        caller = frame.f_locals.get("self")
        if not (_is_pipeline(caller) or isinstance(caller, nn.Module)):
            continue
        found: Session | None = frame.f_locals.get(_SESSION)
        if found is None:
            found = frame.f_locals.setdefault(_SESSION, Session(frame, _models(caller)))
            with _ADDING:
                _sessions.add(found)
        return found
    return None


def all_frames(but: int | None = None) -> list[FrameType]:
    """Of all calls, of whatever, that are running in all threads but one."""
    stacks = [_calls(frame) for thread, frame in sys._current_frames().items() if thread != but]
    return [frame for stack in stacks for frame in stack]


def other_sessions(model: nn.Module | None) -> list[Session]:
    """The calls that this model takes part in, in other threads."""
    here = threading.get_ident()
    with _ADDING:
        known = list(_sessions)
    return [
        each
        for each in known
        if each.thread != here and any(part is model for part in each.models) and each.is_running()
    ]


def _models(caller: Any) -> list[nn.Module]:
    """Those of a pipeline, also within what torch.compile made of them; or the model itself."""
    parts = [caller] if isinstance(caller, nn.Module) else list(vars(caller).values())
    models = [part for part in parts if isinstance(part, nn.Module)]
    return models + [part._orig_mod for part in models if hasattr(part, "_orig_mod")]  # type: ignore[misc]


def pipeline_calls() -> Iterator[tuple[Any, dict[str, Any]]]:
    """The pipelines that are called in this thread, the innermost first, with their arguments and local variables."""
    for frame in _up(sys._getframe(1)):
        if frame.f_code.co_name == "__call__" and _is_pipeline(caller := frame.f_locals.get("self")):
            yield caller, {**frame.f_locals.get("kwargs", {}), **frame.f_locals}


def calls_here(model: nn.Module | None) -> int:
    """How many calls of this model are running in this thread, one in the other."""
    frames = [frame for frame in _up(sys._getframe(1)) if _CALL.match(frame.f_code.co_name)]
    return sum(frame.f_locals.get("self") is model for frame in frames)


def _up(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _calls(frame: FrameType) -> list[FrameType]:
    """Those frames, from this one outwards, that may be calls of pipelines or models."""
    return [outer for outer in _up(frame) if outer.f_code.co_name in ("__call__", "_call_impl")]


def _is_pipeline(caller: Any) -> bool:
    return hasattr(type(caller), "components") and not isinstance(caller, nn.Module)
