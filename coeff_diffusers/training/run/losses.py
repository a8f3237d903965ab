"""Errors of single images, and the loss of a batch of the subject's and its class's images."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def squared_errors(prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """The mean squared error of each image, (B,), in float32, times its weight.

    Args:
        prediction: (B, ...).
        target: of the same shape.
        weights: (B,); `None` weighs all alike.
    """
    errors = F.mse_loss(prediction.float(), target.float(), reduction="none").flatten(1).mean(1)
    return errors if weights is None else errors * weights.flatten()


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
