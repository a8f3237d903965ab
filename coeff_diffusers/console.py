"""What a command shows: what a console lacks as `\\u72d0`, and nothing that other libraries say of themselves."""

from __future__ import annotations

import argparse
import difflib
import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn


@contextmanager
def escaped_output() -> Iterator[None]:
    """Has standard output escape what its encoding lacks. (Standard error always does.)"""
    console = sys.stdout
    if not isinstance(console, io.TextIOWrapper):  # a notebook's, or a window's
        yield
        return
    before = console.errors
    console.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        console.reconfigure(errors=before)


# parts of what libraries log while they are loaded, of ways to compute that nobody here takes
HUSHED = (
    *("requires torchvision", "gemm_4bit_forward"),
    *("/torchao/_C_", "is an Enum subclass", "Unable to import `torchao` Tensor"),
)
LOGGERS = (
    *("bitsandbytes.backends.cpu.ops", "torchao", "torch.utils._pytree"),
    "diffusers.quantizers.torchao.torchao_quantizer",
)


def _is_heard(record: logging.LogRecord) -> bool:
    return not any(part in record.getMessage() for part in HUSHED)


def hush() -> None:
    """Keeps other libraries from `HUSHED`, and transformers from a progress bar within diffusers'."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    for name in LOGGERS:
        logging.getLogger(name).addFilter(_is_heard)
    for handler in logging.getLogger("transformers").handlers:
        handler.addFilter(_is_heard)


class Parser(argparse.ArgumentParser):
    """Names the flags that are like one that there is not, and takes none that is cut off."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"allow_abbrev": False})

    def flags(self) -> list[str]:
        """Those of commands as well."""
        own = [flag for action in self._actions for flag in action.option_strings]
        commands = [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        return own + [flag for action in commands for parser in action.choices.values() for flag in parser.flags()]

    def error(self, message: str) -> NoReturn:
        unknown = message.partition("unrecognized arguments: ")[2].split()
        found = [difflib.get_close_matches(text.partition("=")[0], self.flags(), n=1) for text in unknown]
        if alike := [flag for flags in found for flag in flags]:
            message += f"; did you mean {', '.join(alike)}?"
        super().error(message)
