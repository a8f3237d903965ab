"""Threads that share one computation: what they are told, how they fail, and that they are always free again."""

from __future__ import annotations

import multiprocessing
import os
import threading

import pytest
import torch

from coeff_diffusers import functional, mixed_attention, team
from coeff_diffusers.team import Member


@pytest.mark.parametrize("size", [1, 2, 3])
def test_shares_are_of_everything_and_of_nothing_twice(size: int) -> None:
    for count in (0, 1, 2, 7):
        shares = [Member(index, size).share(count) for index in range(size)]
        assert [i for share in shares for i in range(count)[share]] == list(range(count))


def test_members_compute_on_one_core_and_the_caller_on_as_many_as_before() -> None:
    torch.set_num_threads(3)
    seen: list[tuple[int, int, bool]] = []
    team.run(lambda member: seen.append((member.index, torch.get_num_threads(), torch.is_grad_enabled())), 3)
    assert sorted(seen) == [(0, 1, False), (1, 1, False), (2, 1, False)]
    assert torch.get_num_threads() == 3
    fresh: list[int] = []
    thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert fresh == [3]  # a thread of the user's own


def test_an_error_in_one_thread_is_raised_and_the_others_do_not_wait_for_it() -> None:
    def work(member: Member) -> None:
        if member.index == 1:
            raise MemoryError("no room")
        member.wait()

    for _ in range(2):
        with pytest.raises(MemoryError, match="no room"):
            team.run(work, 2)
    seen: list[int] = []
    team.run(lambda member: seen.append(member.index), 2)
    assert sorted(seen) == [0, 1]


def attend(tokens: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    inputs = [torch.randn(1, 4, tokens, 8, generator=generator) for _ in range(3)]
    coeff = torch.randn(4, 4, generator=generator)
    return [*inputs, coeff], mixed_attention(*inputs, coeff)


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.setattr(functional, "_TEAM_MIN_WORK", 0)
    torch.set_num_threads(2)


@pytest.mark.usefixtures("two_threads")
def test_callers_at_the_same_time_each_get_their_own_answer() -> None:
    expected = {tokens: attend(tokens)[1] for tokens in range(20, 28)}
    answers: dict[int, torch.Tensor] = {}

    def call(tokens: int) -> None:
        torch.set_num_threads(2)
        for _ in range(20):
            answers[tokens] = attend(tokens)[1]

    callers = [threading.Thread(target=call, args=(tokens,), daemon=True) for tokens in expected]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
        assert not caller.is_alive()
    for tokens, answer in expected.items():
        torch.testing.assert_close(answers[tokens], answer, rtol=0, atol=0)  # the same division, so the same bits


@pytest.mark.usefixtures("two_threads")
def test_gradients_are_the_same_bits_every_time() -> None:
    inputs, _ = attend(64)
    leaves = [x.requires_grad_() for x in inputs]
    first = torch.autograd.grad(mixed_attention(*leaves).square().sum(), leaves)
    for _ in range(5):
        again = torch.autograd.grad(mixed_attention(*leaves).square().sum(), leaves)
        for one, other in zip(first, again):
            torch.testing.assert_close(one, other, rtol=0, atol=0)  # bit for bit, as resumed runs must be


def _attend_in_a_fork(expected: torch.Tensor) -> None:
    torch.set_num_threads(2)
    os._exit(0 if torch.equal(attend(24)[1], expected) else 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
@pytest.mark.usefixtures("two_threads")
def test_a_forked_process_has_threads_of_its_own() -> None:
    _, expected = attend(24)
    child = multiprocessing.get_context("fork").Process(target=_attend_in_a_fork, args=(expected,))
    child.start()
    child.join(timeout=60)
    assert child.exitcode == 0


@pytest.mark.usefixtures("two_threads")
def test_inference_tensors_are_written() -> None:
    inputs, expected = attend(24)
    with torch.inference_mode():
        torch.testing.assert_close(mixed_attention(*(x.clone() for x in inputs)), expected, rtol=0, atol=0)
