"""The table of what training should take is what the script predicts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "examples" / "benchmarks"))
import families

PAGE = Path(__file__).parents[2] / "docs" / "training.md"


@pytest.mark.parametrize("name", ["PixArt-Sigma", "FLUX.2 [klein] 4B"])
def test_the_page_has_the_figures_of_the_script(name: str) -> None:
    assert families.row(name) in PAGE.read_text(encoding="utf-8")


def test_a_transformer_of_known_size_has_its_known_operations() -> None:
    """A product and a sum of each of 0.6 thousand million weights with each of 4,096 tokens; and attention."""
    with families.torch.device("meta"):
        model = families.KINDS["PixArt-Sigma"].build()
    operations, attention, _ = families.of_transformer(model, 4096, 0, None)
    assert attention == 4 * 4096**2 * 1152 * 28
    assert 4.5e12 < operations - attention < 5e12
