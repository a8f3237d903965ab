"""The toy example shows what it says: no softmax reaches the targets, coefficients do."""

from __future__ import annotations

import argparse
from pathlib import Path

import convex_hull
import pytest
import torch
from PIL import Image

pytest.importorskip("matplotlib")


def test_maps_end_on_the_hull_and_coefficients_leave_it(tmp_path: Path) -> None:
    args = argparse.Namespace(max_train_steps=300, learning_rate=0.05, seed=0, output_dir=tmp_path)
    found = convex_hull.main(args)
    loss, least = found["loss"], found["least that any softmax can have"]
    assert loss["frozen"] > loss["maps"] >= least * 0.999  # which is found over 3,600 directions
    assert loss["maps"] < 1.05 * least
    assert loss["coefficients"] < 0.05 * least
    distances = found["largest distance from the hull"]
    assert distances["frozen"] == distances["maps"] == 0.0
    assert distances["coefficients"] > 1.0
    assert Image.open(tmp_path / "convex_hull.png").width > 1000


def test_distance_from_the_hull_of_a_square() -> None:
    square = torch.tensor([[[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0], [-1.0, 1.0], [0.3, 0.2]]])
    points = torch.tensor([[[0.0, 0.5], [3.0, 0.0], [4.0, 5.0]]])
    expected = torch.tensor([[0.0, 2.0, 5.0]])
    torch.testing.assert_close(convex_hull.hull_distance(square, points), expected, rtol=1e-5, atol=1e-5)
    assert convex_hull.hull(square[0]).unique(dim=0).shape == (4, 2)
