"""The error of each image."""

from __future__ import annotations

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
