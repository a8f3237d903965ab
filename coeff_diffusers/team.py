"""Threads that work on one thing together, each with one core.

torch divides each of its functions over all cores by itself, and waits for all of them at the end of each. A function
that is a long chain of small ones loses much of the second core so, and nearly all of it when another process takes a
core for a moment. A team divides the whole chain once.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch


def shares(count: int, size: int) -> list[slice]:
    """`count` things in `size` parts, of neighbours, as equal as can be."""
    return [slice(count * i // size, count * (i + 1) // size) for i in range(size)]


@dataclass(frozen=True)
class Member:
    """One of `size` threads that run the same function; `index` says which."""

    index: int = 0
    size: int = 1
    barrier: threading.Barrier | None = None

    def share(self, count: int) -> slice:
        """This member's part of `count` things."""
        return shares(count, self.size)[self.index]

    def wait(self) -> None:
        """Until all members have come here, after which each sees what the others have written."""
        if self.barrier is not None:
            self.barrier.wait()


class _Team:
    """`size` threads, in which torch computes on one core."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = threading.Lock()  # two callers at once would each get a part of the threads and wait for the rest
        self._threads = concurrent.futures.ThreadPoolExecutor(size, "coeff_diffusers")
        self.run(lambda member: self._compute_on_one_core())
        torch.set_num_threads(size)  # for threads to come, for which the members have just said one

    @staticmethod
    def _compute_on_one_core() -> None:
        torch.get_num_threads()  # at the first question a thread takes over the process's number: it is asked before
        torch.set_num_threads(1)

    def run(self, work: Callable[[Member], None]) -> None:
        """Runs `work` in all threads, without gradients. What one of them raises ends all, and is raised here."""
        barrier = threading.Barrier(self.size)
        inference = torch.is_inference_mode_enabled()

        def task(index: int) -> None:
            try:
                with torch.inference_mode(inference), torch.no_grad():
                    work(Member(index, self.size, barrier))
                    barrier.wait()  # so that no thread is given the task of two members
            except BaseException:
                barrier.abort()
                raise

        with self._free:
            _let_openmp_rest()
            tasks = [self._threads.submit(task, index) for index in range(self.size)]
            try:
                concurrent.futures.wait(tasks)
            except BaseException:  # Ctrl-C: they must not go on writing into what the caller gives up
                barrier.abort()
                concurrent.futures.wait(tasks)
                raise
        errors = [error for error in (done.exception() for done in tasks) if error is not None]
        for error in errors:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error


def _let_openmp_rest() -> None:
    """Has OpenMP end the threads with which it computes for the calling one; it starts others when it needs them.

    For some milliseconds after torch's last function they would look out for more work without pause, on the cores
    that the members need. Starting others takes less than a tenth of a millisecond.
    """
    pause = _openmp_pause()
    if pause is not None:
        pause(1)  # omp_pause_soft


@functools.cache
def _openmp_pause() -> Callable[[int], int] | None:
    """`omp_pause_resource_all` of OpenMP 5.0, in the runtime that torch has loaded; `None` where it is not found."""
    try:
        pause: Callable[[int], int] = ctypes.CDLL(None).omp_pause_resource_all
        return pause
    except (AttributeError, OSError, TypeError):
        return None


_team: _Team | None = None
_creating = threading.Lock()


def run(work: Callable[[Member], None], size: int) -> None:
    """Runs `work` in `size` threads, or for one member in the thread that calls; which keeps as many for next time."""
    global _team
    if size == 1:
        work(Member())
        return
    with _creating:
        if _team is None or _team.size != size:
            _team = _Team(size)
        team = _team
    team.run(work)


def can_share(device: torch.device) -> bool:
    """Whether the cores can be given to threads: not where torch has threads of its own instead of OpenMP's."""
    return device.type == "cpu" and _by_openmp() and torch.get_num_threads() > 1


@functools.cache
def _by_openmp() -> bool:
    return "parallel backend: OpenMP" in torch.__config__.parallel_info()


def _forget() -> None:
    global _team, _creating
    _team, _creating = None, threading.Lock()


if hasattr(os, "register_at_fork"):  # threads do not live on in a forked process
    os.register_at_fork(after_in_child=_forget)
