"""Errors and the loss of a batch, against naive loops."""

from __future__ import annotations

import pytest
import torch

from coeff_diffusers.training.families.losses import squared_errors
from coeff_diffusers.training.run.losses import dreambooth_loss

SHAPE = (6, 3, 5, 4)
KINDS = ["instance"] * 3 + ["class"] * 3


def random(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("weighted", [False, True])
def test_each_images_error_is_its_weighted_mean(weighted: bool) -> None:
    prediction, target = random(0), random(1)
    weights = torch.tensor([0.5, 1.0, 2.0, 0.1, 3.0, 0.7]) if weighted else None
    errors = squared_errors(prediction, target, weights)
    for b in range(6):
        expected = ((prediction[b] - target[b]) ** 2).sum() / (3 * 5 * 4) * (weights[b] if weighted else 1.0)
        torch.testing.assert_close(errors[b], expected, rtol=1e-5, atol=0)  # sums of 60 float32 in another order


def test_what_lies_outside_of_an_images_box_does_not_count() -> None:
    prediction, target = random(0), random(1)
    boxes = torch.tensor(
        [[0.0, 0, 1, 1], [0.2, 0, 1, 0.75], [0.5, 0.5, 1, 1], [0, 0, 0.31, 1], [0, 0.1, 1, 1], [0, 0, 1, 1]]
    )
    parts = [(0, 5, 0, 4), (1, 5, 0, 3), (3, 5, 2, 4), (0, 2, 0, 4), (0, 5, 0, 4), (0, 5, 0, 4)]  # by pixels' centres
    weights = torch.arange(1.0, 7.0)
    errors = squared_errors(prediction, target, weights, boxes)
    for b, (top, bottom, left, right) in enumerate(parts):
        part = ((prediction - target)[b, :, top:bottom, left:right] ** 2).mean() * weights[b]
        torch.testing.assert_close(errors[b], part, rtol=1e-5, atol=0)  # as above
    videos = squared_errors(prediction[:, :, None], target[:, :, None], weights, boxes)
    torch.testing.assert_close(videos, errors, rtol=1e-6, atol=0)  # as above


@pytest.mark.parametrize("order", [range(6), [0, 3, 1, 4, 2, 5]])
def test_class_images_are_weighed_as_a_half_of_their_own_wherever_they_stand(order: list[int]) -> None:
    errors = torch.tensor([1.0, 2.0, 6.0, 10.0, 20.0, 60.0])
    loss = dreambooth_loss(errors[list(order)], [KINDS[i] for i in order], 0.3)
    assert loss.item() == pytest.approx(3.0 + 0.3 * 30.0)


def test_a_prior_weight_of_zero_leaves_the_subjects_images() -> None:
    errors = torch.rand(6)
    torch.testing.assert_close(dreambooth_loss(errors, KINDS, 0.0), dreambooth_loss(errors[:3], KINDS[:3]))


def test_halves_of_other_sizes_are_each_a_mean() -> None:
    assert dreambooth_loss(torch.tensor([1.0, 3.0, 8.0]), ["instance", "instance", "class"], 0.5).item() == 6.0


@pytest.mark.parametrize("kinds", [["class"] * 6, ["instance"] * 5, ["instance"] * 5 + ["other"]])
def test_a_batch_that_does_not_fit_its_kinds_is_an_error(kinds: list[str]) -> None:
    with pytest.raises(ValueError, match="a batch of 6 needs as many kinds, instance or class"):
        dreambooth_loss(torch.zeros(6), kinds)


def test_errors_are_taken_in_float32() -> None:
    prediction, target = random(0).bfloat16(), random(1).bfloat16()
    expected = squared_errors(prediction.float(), target.float())
    torch.testing.assert_close(squared_errors(prediction, target), expected, rtol=0, atol=0)
