"""Errors, shown on the page as messages: the package's own text, never a traceback."""

from __future__ import annotations

import functools
import html
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr
from pydantic import ValidationError

from ..serving.requests import Refusal
from ..training.errors import Stopped

logger = logging.getLogger(__name__)
EXPECTED = (ValueError, OSError, ModuleNotFoundError, FloatingPointError, Refusal, Stopped)
LONGEST = 2000  # characters; a file of a stranger can have longer ones said


def text_of(error: BaseException) -> str:
    """What a visitor is told of an error, as plain text."""
    if isinstance(error, ValidationError):
        text = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
    elif isinstance(error, Refusal) and error.field not in (None, "subject", "prompt"):
        text = f"{error.field} {error}"
    elif isinstance(error, EXPECTED):
        text = str(error)
    else:
        text = f"the app failed: {type(error).__name__}. Its log says more."
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


def shown(text: str) -> gr.Error:
    """A message on the page, in which markup is text."""
    escaped = html.escape(text).replace("\n", "<br>")
    return gr.Error(escaped, duration=30, print_exception=False)


@contextmanager
def as_messages() -> Iterator[None]:
    """Inside, errors become messages; what nobody thought of is logged as well."""
    try:
        yield
    except gr.Error:
        raise
    except Exception as error:
        if not isinstance(error, EXPECTED):
            logger.exception("the app failed")
        raise shown(text_of(error)) from None


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the page whose errors are messages."""
    if inspect.isasyncgenfunction(function):

        @functools.wraps(function)
        async def steps(*args: Any, **kwargs: Any) -> Any:
            with as_messages():
                async for value in function(*args, **kwargs):
                    yield value

        return steps

    @functools.wraps(function)
    def once(*args: Any, **kwargs: Any) -> Any:
        with as_messages():
            return function(*args, **kwargs)

    return once
