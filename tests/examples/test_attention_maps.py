"""The example on maps measures them and draws them."""

from __future__ import annotations

import argparse
from pathlib import Path

import attention_maps
import pytest
import torch
from diffusers import UNet2DConditionModel
from hosts import randomise
from PIL import Image

from coeff_diffusers import AttentionMaps, add_coeff_adapter, save_coeff_weights


def test_the_example_measures_every_layer_with_the_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unet = UNet2DConditionModel.from_pretrained(attention_maps.MODEL / "unet")
    add_coeff_adapter(unet)
    randomise(unet, scale=0.2)
    save_coeff_weights(unet, tmp_path)
    args = argparse.Namespace(
        coeff_weights=tmp_path, subject="fox face", images=1, num_inference_steps=1, output_file=tmp_path / "maps.png"
    )
    rows = attention_maps.main(args)
    assert len(rows) == 7
    for path, (on, _, off, _, change, outside) in rows:
        assert path.endswith("attn2")
        assert 0 < on < 1
        assert 0 < off < 1
        assert change > 0
        assert 0 < outside < 1
    assert Image.open(tmp_path / "maps.png").height > 500
    assert "unet.mid_block.0.0.attn2" in capsys.readouterr().out


def test_numbers_tell_the_subject_from_what_is_beside_it() -> None:
    image = Image.new("RGB", (8, 8), "blue")
    image.paste((255, 128, 0), (0, 2, 4, 6))
    before = torch.zeros(2, 4, 4)
    before[0, 1:3, :2] = 0.5  # on the subject
    before[1, :, 3] = 0.25
    found = AttentionMaps(image, (3,), {"a": before}, {"a": -2 * before}, (0,))
    on, on_after, off, off_after, change, outside = attention_maps.numbers([found], "a")
    assert [on, on_after] == pytest.approx([0.25, 0.5], abs=1e-3)
    assert [off, off_after] == pytest.approx([0.5 * 4 * 0.25 / 12, 4 * 0.25 / 12], abs=1e-3)
    assert [change, outside] == pytest.approx([3.0, 8 / 32], abs=1e-3)
