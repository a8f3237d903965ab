"""What the benchmarks share: the machine's name, memory of this process, and the file that a table goes to."""

from __future__ import annotations

import ctypes
import datetime
import gc
import platform
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch

from coeff_diffusers.backends.cpu import instruction_set

STATUS, CPUINFO = Path("/proc/self/status"), Path("/proc/cpuinfo")


def machine() -> str:
    cpu = platform.processor()
    if CPUINFO.exists():
        cpu = next(
            (line.split(":")[1].strip() for line in CPUINFO.read_text().splitlines() if "model name" in line), cpu
        )
    threads, instructions = torch.get_num_threads(), instruction_set() or "none"
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}, Python {platform.python_version()}"
    return f"{cpu}, {threads} threads, kernel: {instructions}, {versions}, {datetime.date.today()}"


def write(text: str, path: Path) -> None:
    print(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print(f"wrote {path}")


def peak_memory(call: Callable[[], Any]) -> tuple[float, Any]:
    """MB by which the resident memory of this process peaks over its level before the call; and the call's result."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is freed and not yet given back would hide new memory
    before = current_memory()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    result = call()
    return highest_memory() - before, result


def peak_of_own_memory(call: Callable[[], Any]) -> float:
    """MB of memory that is no file's, at the peak during the call, looked at 100 times a second.

    Left out are pages of files, which stay resident until something else needs the room.
    """
    done, seen = threading.Event(), [0.0]

    def look() -> None:
        while not done.wait(0.01):
            seen.append(max(seen.pop(), _status("RssAnon")))

    watch = threading.Thread(target=look)
    watch.start()
    try:
        call()
    finally:
        done.set()
        watch.join()
    return seen[0]


def current_memory() -> float:
    """MB of resident memory of this process."""
    return _status("VmRSS")


def highest_memory() -> float:
    """MB of resident memory at the peak since `peak_memory` was called last."""
    return _status("VmHWM")


def _status(field: str) -> float:
    """MB, from Linux's own account of this process."""
    return next(int(line.split()[1]) / 1024 for line in STATUS.read_text().splitlines() if line.startswith(field))
