"""A console that lacks a character of a path or a prompt shows it as `\\u72d0`; it does not end what was asked for."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager


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
