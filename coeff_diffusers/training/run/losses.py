"""The loss of a batch, each subject's apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def dreambooth_loss(errors: Tensor, kinds: Sequence[str], prior_loss_weight: float = 1.0) -> Tensor:
    """The mean error of the subject's images, plus `prior_loss_weight` times that of the class images.

    Args:
        errors: (B,), of each image.
        kinds: `"instance"` or `"class"` for each image, in any order.
    """
    chosen = {kind: [i for i, other in enumerate(kinds) if other == kind] for kind in dict.fromkeys(kinds)}
    if set(chosen) - {"instance", "class"} or "instance" not in chosen or len(kinds) != len(errors):
        raise ValueError(f"a batch of {len(errors)} needs as many kinds, instance or class, got {list(kinds)}")
    loss = errors[chosen["instance"]].mean()
    return loss + prior_loss_weight * errors[chosen["class"]].mean() if "class" in chosen else loss


def losses_by_subject(errors: Tensor, batch: dict[str, Any], prior_loss_weight: float) -> dict[str, Tensor]:
    """Subject -> the loss of its rows, a scalar.

    Args:
        errors: (B,), of each row.
        batch: as of `collate_subjects`.
        prior_loss_weight: as of [`dreambooth_loss`].
    """
    losses = {}
    for name in dict.fromkeys(batch["subjects"]):
        rows = [row for row, other in enumerate(batch["subjects"]) if other == name]
        losses[name] = dreambooth_loss(errors[rows], [batch["kinds"][row] for row in rows], prior_loss_weight)
    return losses


def clip_gradients(groups: Iterable[list[torch.nn.Parameter]], accelerator: Any, max_norm: float) -> None:
    """The gradients of each subject's parameters to a norm of its own."""
    groups = list(groups)
    if len(groups) == 1:
        accelerator.clip_grad_norm_(groups[0], max_norm)
        return
    accelerator.unscale_gradients()  # once for all, as accelerate's own clipping would for each
    for group in groups:
        torch.nn.utils.clip_grad_norm_(group, max_norm)
