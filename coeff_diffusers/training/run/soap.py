"""SOAP (arXiv 2409.11321): Adam in the eigenbases of the gradients, over stacks of matrices of one size.

Of a matrix W (m, n) with gradient G, at each step:

    M = mean of G                                  decay beta1
    V = mean of (Q_L^T G Q_R)^2                    decay beta2
    W = (1 - lr weight_decay) W - lr Q_L (Q_L^T M Q_R / (sqrt(V) + eps)) Q_R^T       M and V corrected as Adam's
    L = mean of G G^T,  R = mean of G^T G          decay beta2

Q_L and Q_R are the eigenvectors of L and R. The first step makes them and changes nothing else, for a gradient in its
own basis is its singular values and rounding; every `precondition_frequency` steps one power iteration brings them up
to date. Layers of one size are one tensor (N, m, n), so that a step takes as many launches for a thousand of them as
for one; none sees another's values.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

Stack = dict[str, Tensor]  # of N matrices: their state by name, each (N, ...)


class SOAP(torch.optim.Optimizer):
    """Adam in the eigenbases of the gradients, as above.

    Sides longer than `max_precondition_dim` are not rotated, nor are parameters that are no matrices, which thus have
    plain Adam. State and arithmetic are in the parameters' own dtype. Parameters without a gradient are passed over.

    Args:
        params: as of any optimizer; float32 or float64, for in 16 bits bases are not orthogonal.
        lr: learning rate.
        betas: decays of the means; 0.9 is Adam's, 0.99 was tried here.
        eps: added to the root of V.
        weight_decay: decoupled, as AdamW's: a step takes lr * weight_decay of the parameters off.
        precondition_frequency: steps from one power iteration to the next, 10 as in the paper.
        max_precondition_dim: longest side that is rotated, 10,000 as in the paper.

    Raises:
        TypeError: if a parameter is of another dtype.
        ValueError: if an argument is out of range, or a state that is loaded is not one of this class.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        precondition_frequency: int = 10,
        max_precondition_dim: int = 10_000,
    ) -> None:
        if not all(0 <= beta < 1 for beta in betas) or len(betas) != 2:
            raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
        if precondition_frequency < 1:
            raise ValueError(f"precondition_frequency must be at least 1, got {precondition_frequency}")
        arguments = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "max_precondition_dim": max_precondition_dim}
        if wrong := {name: value for name, value in arguments.items() if not value >= 0}:
            raise ValueError(f"must be 0 or more: {wrong}")
        frequency = {"precondition_frequency": precondition_frequency}
        super().__init__(params, {**arguments, **frequency, "betas": betas})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._stacks: dict[tuple[int, ...], Stack] = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._stacks = {}
        if wrong := {p.dtype for p in self.param_groups[-1]["params"]} - {torch.float32, torch.float64}:
            raise TypeError(f"SOAP takes parameters of float32 or float64, got {', '.join(map(str, wrong))}")

    def state_dict(self) -> dict[str, Any]:
        """Of copies, for what pickles views of a stack would pickle the stack with each."""
        kept = super().state_dict()
        copies = {n: {name: _copy(value) for name, value in of.items()} for n, of in kept["state"].items()}
        return kept | {"state": copies}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        names = {"step", "M", "V", "L", "Q_L", "R", "Q_R"}
        if any(not {"step", "M", "V"} <= of.keys() <= names for of in state_dict["state"].values()):
            raise ValueError("the state that is loaded is that of another optimizer than this SOAP")
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: dict[Any, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.shape, p.dtype, p.device, self.state[p].get("step", 0)].append(p)
            for (*_, steps), params in alike.items():
                self._step_of(params, group, steps)
        return loss

    def _step_of(self, params: list[Tensor], group: dict[str, Any], steps: int) -> None:
        """Of parameters of one shape that have had as many steps, from 0."""
        gradients = [p.grad for p in params if p.grad is not None]
        G = torch.stack(gradients)  # (N, ...)
        stack = self._stack_of(params) if steps else self._new_stack(params, G, group["max_precondition_dim"])
        beta1, beta2 = group["betas"]
        sides = [side for side in "LR" if side in stack]
        if steps or not sides:
            done = steps if sides else steps + 1  # that changed parameters, this one included
            stack["M"].lerp_(G, 1 - beta1)
            stack["V"].lerp_(_rotate(stack, G, sides).square(), 1 - beta2)
            root = (stack["V"] / (1 - beta2**done)).sqrt_().add_(group["eps"])
            update = _rotate(stack, stack["M"], sides).div_(root).div_(1 - beta1**done)
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_sub_(params, _rotate(stack, update, sides, back=True).unbind(), alpha=group["lr"])
        else:
            torch._foreach_add_(params, gradients, alpha=0.0)  # what is not finite shows, as in any other step
        for side in sides:
            stack[side].lerp_(_gram(G, side), 1 - beta2)
            if not steps:
                stack[f"Q_{side}"].copy_(_eigenvectors(stack[side]))
            elif steps % group["precondition_frequency"] == 0:
                _iterate(stack, side)
        for p in params:
            self.state[p]["step"] = steps + 1

    def _new_stack(self, params: list[Tensor], G: Tensor, longest: int) -> Stack:
        stack = {"M": torch.zeros_like(G), "V": torch.zeros_like(G)}
        for side, length in zip("LR", G.shape[1:] if G.ndim == 3 else ()):
            if length <= longest:
                stack[side] = G.new_zeros(len(G), length, length)
                stack[f"Q_{side}"] = torch.zeros_like(stack[side])
        return self._keep(params, stack)

    def _stack_of(self, params: list[Tensor]) -> Stack:
        """Made of the parameters' own state where they were in no stack together, or it was loaded."""
        if stack := self._stacks.get(tuple(map(id, params))):
            return stack
        names = [name for name in self.state[params[0]] if name != "step"]
        return self._keep(params, {name: torch.stack([self.state[p][name] for p in params]) for name in names})

    def _keep(self, params: list[Tensor], stack: Stack) -> Stack:
        """Has the state of each parameter be a view of the stack."""
        moved = set(map(id, params))
        self._stacks = {key: other for key, other in self._stacks.items() if not moved & set(key)}
        self._stacks[tuple(map(id, params))] = stack
        for n, p in enumerate(params):
            self.state[p].update({name: value[n] for name, value in stack.items()})
        return stack


def _rotate(stack: Stack, X: Tensor, sides: list[str], back: bool = False) -> Tensor:
    """Q_L^T X Q_R of each matrix (N, m, n), or Q_L X Q_R^T; on the `sides` that are rotated. A new tensor."""
    if "L" in sides:
        X = (stack["Q_L"] if back else stack["Q_L"].mT) @ X
    if "R" in sides:
        X = X @ (stack["Q_R"].mT if back else stack["Q_R"])
    return X if sides else X.clone()


def _gram(G: Tensor, side: str) -> Tensor:
    product: Tensor = G @ G.mT if side == "L" else G.mT @ G
    return product


def _eigenvectors(matrices: Tensor) -> Tensor:
    """Columns (N, n, n), that of the largest eigenvalue first; what is not finite counts as zero."""
    vectors: Tensor = torch.linalg.eigh(matrices.nan_to_num(0.0, 0.0, 0.0)).eigenvectors
    return vectors.flip(-1)


def _iterate(stack: Stack, side: str) -> None:
    """One power iteration for the basis of a side, whose columns, and V, are then in the order of the eigenvalues."""
    Q = stack[f"Q_{side}"]
    product = stack[side] @ Q
    order = (Q * product).sum(1).argsort(descending=True, stable=True)  # (N, n)
    Q.copy_(_orthogonal(product.gather(2, order[:, None].expand_as(product))))
    V, (axis, index) = stack["V"], (1, order[:, :, None]) if side == "L" else (2, order[:, None])
    V.copy_(V.gather(axis, index.expand_as(V)))


def _orthogonal(matrices: Tensor) -> Tensor:
    """Q of the QR decomposition of each, (N, n, n).

    By the compact WY form, Q = I - Y T Y^T with the reflectors Y that geqrf leaves below the diagonal, and
    T^-1 = strict upper triangle of Y^T Y + diag(1 / tau): on a GPU torch.linalg.qr puts one matrix together after
    the other.
    """
    packed, tau = torch.geqrf(matrices)
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    none = tau == 0  # no reflection
    Y = (packed.tril(-1) + identity).masked_fill(none[:, None], 0.0)
    inverse = (Y.mT @ Y).triu(1) + torch.diag_embed(1 / tau.masked_fill(none, 1.0))
    Q: Tensor = identity - Y @ torch.linalg.solve_triangular(inverse, Y.mT, upper=True)
    return Q


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
