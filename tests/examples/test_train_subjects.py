"""The example of many subjects runs, with few steps, and so does their benchmark."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import train_subjects
from PIL import Image
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).parents[2] / "examples" / "benchmarks"))
import many_subjects

pytestmark = pytest.mark.slow


def test_the_example_trains_each_subject_on_its_own_images_and_shows_all(tmp_path: Path) -> None:
    args = argparse.Namespace(
        subjects=["fox face", "owl"], max_train_steps=2, train_batch_size=1, seed=0, output_dir=tmp_path
    )
    assert train_subjects.main(args) == tmp_path / "subjects.png"
    assert Image.open(tmp_path / "subjects.png").width > 300
    fox, owl = (
        load_file(tmp_path / "trained" / name / "pytorch_coeff_weights.safetensors") for name in ("fox-face", "owl")
    )
    assert all(fox[key].abs().sum() > 0 and not fox[key].equal(owl[key]) for key in fox)


def test_the_benchmark_measures_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many_subjects, "SUBJECTS", ["fox face", "owl"])
    for way in many_subjects.WAYS:
        figures = many_subjects.measure(way, 1, 2)
        assert figures["seconds"] > 0
        assert "memory" in figures
