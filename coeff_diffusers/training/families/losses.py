"""The error of each image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def squared_errors(
    prediction: Tensor, target: Tensor, weights: Tensor | None = None, boxes: Tensor | None = None
) -> Tensor:
    """The mean squared error of each image, (B,), in float32, times its weight.

    Args:
        prediction: (B, ..., h, w).
        target: of the same shape.
        weights: (B,); `None` weighs all alike.
        boxes: (B, 4), top, left, bottom and right of what counts of each image, as parts of its sides; `None` is all.
    """
    errors = F.mse_loss(prediction.float(), target.float(), reduction="none")
    if boxes is None:
        errors = errors.flatten(1).mean(1)
    else:
        inside = pixels_inside(boxes.to(errors), *errors.shape[-2:])  # (B, h, w)
        inside = inside.view(len(inside), *[1] * (errors.ndim - 3), *inside.shape[1:]).expand_as(errors)
        errors = (errors * inside).flatten(1).sum(1) / inside.flatten(1).sum(1)
    return errors if weights is None else errors * weights.flatten()


def pixels_inside(boxes: Tensor, height: int, width: int) -> Tensor:
    """(B, height, width), 1 where a pixel's centre lies in its image's box, and 0 elsewhere."""
    top, left, bottom, right = boxes[:, :, None].unbind(1)  # (B, 1)
    rows = (torch.arange(height, device=boxes.device) + 0.5) / height
    columns = (torch.arange(width, device=boxes.device) + 0.5) / width
    in_rows, in_columns = (rows > top) & (rows < bottom), (columns > left) & (columns < right)
    return (in_rows[:, :, None] & in_columns[:, None]).to(boxes)
