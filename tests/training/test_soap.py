"""SOAP over stacks, against its equations written out for one matrix at a time."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coeff_diffusers.training import SOAP

SHAPES = ((5, 5), (3, 3), (5, 5), (4, 6))
OPTIONS: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.5}


def parameters(shapes: Any = SHAPES, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def gradient(number: int, step: int, like: Tensor) -> Tensor:
    """Whose size differs from step to step and from matrix to matrix."""
    generator = torch.Generator().manual_seed(100 * number + step)
    return (step + 1) * torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def take_steps(optimizer: SOAP, params: list[nn.Parameter], steps: range, without: Any = ()) -> None:
    for step in steps:
        for number, p in enumerate(params):
            p.grad = None if (number, step) in without else gradient(number, step, p)
        optimizer.step()


def one_matrix(W: Tensor, gradients: list[Tensor], frequency: int, longest: int) -> Tensor:
    """The oracle: the paper's equations, by torch.linalg's own decompositions."""
    lr, (beta1, beta2), eps, decay = OPTIONS["lr"], OPTIONS["betas"], OPTIONS["eps"], OPTIONS["weight_decay"]
    grams = [(1 - beta2) * G @ G.T for G in (gradients[0], gradients[0].T)]  # L, R
    bases = [torch.linalg.eigh(gram).eigenvectors.flip(1) for gram in grams]
    bases = [Q if len(Q) <= longest else torch.eye(len(Q), dtype=Q.dtype) for Q in bases]
    M, V = torch.zeros_like(W), torch.zeros_like(W)
    for step, G in enumerate(gradients[1:], 1):
        Q_L, Q_R = bases
        M = beta1 * M + (1 - beta1) * G
        V = beta2 * V + (1 - beta2) * (Q_L.T @ G @ Q_R) ** 2
        mean, square = M / (1 - beta1**step), V / (1 - beta2**step)
        W = (1 - lr * decay) * W - lr * Q_L @ (Q_L.T @ mean @ Q_R / (square.sqrt() + eps)) @ Q_R.T
        grams = [beta2 * gram + (1 - beta2) * X @ X.T for gram, X in zip(grams, (G, G.T))]
        for side, (gram, Q) in enumerate(zip(grams, bases)):
            if step % frequency == 0 and len(Q) <= longest:
                order = (Q.T @ gram @ Q).diagonal().argsort(descending=True)
                bases[side] = torch.linalg.qr(gram @ Q[:, order]).Q
                V = V.index_select(side, order)
    return W


def test_a_stack_gets_what_each_matrix_gets_by_the_equations() -> None:
    """Also one with a side of 6, which is too long here to be rotated."""
    params = parameters()
    expected = [
        one_matrix(p.detach().clone(), [gradient(n, step, p) for step in range(8)], frequency=3, longest=5)
        for n, p in enumerate(params)
    ]
    optimizer = SOAP(params, **OPTIONS, precondition_frequency=3, max_precondition_dim=5)
    take_steps(optimizer, params, range(8))
    for found, other in zip(params, expected):
        torch.testing.assert_close(found.detach(), other, rtol=1e-9, atol=1e-9)  # float64, other order of sums


def test_the_first_step_makes_the_bases_and_changes_no_parameter() -> None:
    params = parameters(((4, 4),))
    before = params[0].detach().clone()
    optimizer = SOAP(params, **OPTIONS)
    take_steps(optimizer, params, range(1))
    assert torch.equal(params[0], before)
    U, _, Vh = torch.linalg.svd(gradient(0, 0, before))
    for basis, other in (("Q_L", U), ("Q_R", Vh.T)):
        overlap = (optimizer.state[params[0]][basis].T @ other).abs()  # eigenvectors up to their signs
        torch.testing.assert_close(overlap, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shapes", [((4,), ()), ((2, 3, 4),), ((3, 5), (3, 5))], ids=["vectors", "3-D", "too long"])
def test_what_is_not_rotated_has_adam(shapes: Any) -> None:
    """Also `AdamW`'s first step, which no basis has to wait for."""
    params, others = parameters(shapes), parameters(shapes)
    take_steps(SOAP(params, **OPTIONS, max_precondition_dim=2), params, range(5))
    take_steps(torch.optim.AdamW(others, **OPTIONS), others, range(5))  # type: ignore[arg-type]
    for found, other in zip(params, others):
        torch.testing.assert_close(found, other, rtol=1e-12, atol=1e-12)  # float64, other order of products


def test_a_matrix_among_many_gets_the_bits_that_it_gets_alone() -> None:
    """Also where others have steps in between, and all are together again."""
    params, alone = parameters(((20, 20),) * 9, torch.float32), parameters(((20, 20),) * 9, torch.float32)
    without = {(n, step) for n in range(9) for step in ((0, 4) if n in (0, 1, 3) else (1, 5))}
    take_steps(SOAP(params, precondition_frequency=2), params, range(8), without)
    for number, p in enumerate(alone):
        optimizer = SOAP([p], precondition_frequency=2)
        for step in range(8):
            p.grad = None if (number, step) in without else gradient(number, step, p)
            optimizer.step()
        assert torch.equal(p, params[number]), number


@pytest.mark.parametrize("steps_before", [0, 3])
def test_it_resumes_to_the_same_bits(steps_before: int) -> None:
    """Also in an optimizer that has taken other steps before."""
    whole, params = parameters(dtype=torch.float32), parameters(dtype=torch.float32)
    take_steps(SOAP(whole, **OPTIONS, precondition_frequency=2), whole, range(7))
    optimizer = SOAP(params, **OPTIONS, precondition_frequency=2)
    take_steps(optimizer, params, range(4))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    take_steps(optimizer, params, range(4, 6))  # goes on after the checkpoint, which must not change
    again = parameters(dtype=torch.float32)
    resumed = SOAP(again, **OPTIONS, precondition_frequency=2)
    take_steps(resumed, again, range(steps_before))
    for p, value in zip(again, params_after(4)):
        p.data.copy_(value)
    resumed.load_state_dict(state)
    take_steps(resumed, again, range(4, 7))
    assert all(torch.equal(found, other) for found, other in zip(again, whole))


def params_after(steps: int) -> list[Tensor]:
    params = parameters(dtype=torch.float32)
    take_steps(SOAP(params, **OPTIONS, precondition_frequency=2), params, range(steps))
    return [p.detach().clone() for p in params]


def test_its_state_is_no_larger_than_what_it_holds() -> None:
    """Views of a stack would each take the whole stack along when they are pickled."""
    params = parameters(((6, 6),) * 50, torch.float32)
    optimizer = SOAP(params)
    take_steps(optimizer, params, range(1))
    values = [value for of in optimizer.state_dict()["state"].values() for value in of.values()]
    assert all(v.untyped_storage().nbytes() == 4 * 36 for v in values if isinstance(v, Tensor))


def test_a_step_makes_no_more_calls_for_more_matrices() -> None:
    """But for handing gradients in and values out, which torch's own foreach functions do."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += 1
            return func(*args, **(kwargs or {}))

    def calls(count: int) -> int:
        params = parameters(((4, 4),) * count)
        optimizer = SOAP(params, precondition_frequency=1)
        take_steps(optimizer, params, range(2))
        with Count() as counted:
            optimizer.step()
        return counted.calls

    assert calls(2) == calls(40)


def test_gradients_that_are_not_finite_show_in_the_parameters() -> None:
    """So that the loop stops with the images that they are of; also in the first step, which else changes nothing."""
    params = parameters(((4, 4), (4, 4)))
    optimizer = SOAP(params)
    for p, value in zip(params, (float("nan"), 1.0)):
        p.grad = torch.full_like(p, value)
    optimizer.step()
    assert params[0].isnan().any()
    assert params[1].isfinite().all()


def test_gradients_of_zero_change_nothing() -> None:
    params = parameters(((4, 4),))
    before = params[0].detach().clone()
    optimizer = SOAP(params, precondition_frequency=1)
    for _ in range(3):
        params[0].grad = torch.zeros_like(params[0])
        optimizer.step()
    assert torch.equal(params[0], before)


@pytest.mark.parametrize(
    ("make", "error", "problem"),
    [
        (
            lambda p: SOAP([p.detach().bfloat16()]),
            TypeError,
            "SOAP takes parameters of float32 or float64, got torch.bfloat16",
        ),
        (
            lambda p: SOAP([p], betas=(0.9, 1.0)),
            ValueError,
            r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)",
        ),
        (
            lambda p: SOAP([p], precondition_frequency=0),
            ValueError,
            "precondition_frequency must be at least 1, got 0",
        ),
        (lambda p: SOAP([p], lr=-1.0), ValueError, "must be 0 or more: {'lr': -1.0}"),
        (lambda p: load_adams([p]), ValueError, "the state that is loaded is that of another optimizer"),
    ],
)
def test_what_it_cannot_take_is_refused(make: Callable[[Tensor], Any], error: type[Exception], problem: str) -> None:
    with pytest.raises(error, match=problem):
        make(torch.zeros(2, 2, requires_grad=True))


def load_adams(params: list[Tensor]) -> None:
    adam = torch.optim.AdamW(params)
    params[0].grad = torch.ones_like(params[0])
    adam.step()
    SOAP(params).load_state_dict(adam.state_dict())
