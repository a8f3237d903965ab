"""The script that trains the embedded transformer: it goes on to the bit, and exports a pipeline."""

from __future__ import annotations

from pathlib import Path

import evaluate
import pretrain
import pretrain_dit
import pytest
import torch
from diffusers import StableDiffusionPipeline
from scenes import BACKGROUNDS, Scene
from test_emoji import SHOWN, package  # noqa: F401

from coeff_diffusers import add_coeff_adapter, coeff_parameters

EMOJI = Path(pretrain_dit.__file__).parent


@pytest.fixture
def settings(package, monkeypatch, tmp_path) -> dict[str, object]:  # noqa: F811
    """Of a run on two glyphs and a small transformer."""
    for module in (pretrain, pretrain_dit):
        monkeypatch.setattr(module, "GLYPHS", SHOWN)
    for name in set(BACKGROUNDS) - {"white", "blue"}:
        monkeypatch.delitem(BACKGROUNDS, name)
    return {
        "emoji_package": str(package), "work_dir": str(tmp_path / "work"), "output_dir": str(tmp_path / "model"),
        "num_layers": 2, "num_attention_heads": 1, "patch_size": 4, "batch_size": 3, "first_glyphs": 1,
        "first_steps": 2, "steps": 4, "checkpointing_steps": 3,
    }  # fmt: skip


def test_training_goes_on_to_the_bit_and_exports_a_pipeline(settings, monkeypatch, tmp_path) -> None:
    def kill(*args, **parts) -> None:
        pretrain.save_checkpoint(*args, **parts)
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain_dit, "save_checkpoint", kill)
    with pytest.raises(KeyboardInterrupt):
        pretrain_dit.main(pretrain_dit.Settings(**settings))
    monkeypatch.setattr(pretrain_dit, "save_checkpoint", pretrain.save_checkpoint)
    checkpoint = tmp_path / "work" / "dit.pt"
    assert torch.load(checkpoint)["step"] == 3
    pretrain_dit.main(pretrain_dit.Settings(**settings))
    resumed = torch.load(checkpoint)
    checkpoint.unlink()
    pretrain_dit.main(pretrain_dit.Settings(**settings | {"output_dir": str(tmp_path / "at once")}))
    torch.testing.assert_close(torch.load(checkpoint), resumed, rtol=0, atol=0)

    # what is exported: the averaged weights; the rest is that of the base
    pipe = evaluate.load_pipeline(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    average = torch.cat([tensor.flatten() for tensor in resumed["ema"]["shadow_params"]])
    shipped = torch.cat([tensor.flatten() for tensor in pipe.transformer.parameters()])
    torch.testing.assert_close(shipped, average.half().float(), rtol=0, atol=0)
    base = StableDiffusionPipeline.from_pretrained(EMOJI / "model")
    ids = base.tokenizer(["an apple"], padding="max_length", return_tensors="pt").input_ids
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        torch.testing.assert_close(encoder(ids).text_embeds, base.text_encoder(ids).pooler_output, rtol=0, atol=0)
    assert not [file for file in EMOJI.rglob("*") if file.is_symlink()]  # of which git makes text files on Windows
    for part in ("vae/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json", "tokenizer_2/tokenizer.json"):
        shared = (EMOJI / "model" / part.replace("_2", "")).read_bytes()
        assert (tmp_path / "model" / part).read_bytes() == (EMOJI / "model_dit" / part).read_bytes() == shared
    assert pipe("an apple", num_inference_steps=1).images[0].size == (64, 64)

    # without a checkpoint it goes on from there, with an optimizer that warms up
    checkpoint.unlink()
    pretrain_dit.main(pretrain_dit.Settings(**settings | {"steps": 5, "learning_rate": 1e-12}))
    continued = torch.load(checkpoint)
    assert continued["step"] == 5
    assert continued["optimizer"]["param_groups"][0]["lr"] == pytest.approx(1e-12 / pretrain_dit.WARMUP)
    later = evaluate.load_pipeline(tmp_path / "model").transformer
    torch.testing.assert_close(later.state_dict(), pipe.transformer.state_dict(), rtol=0, atol=0)


def test_one_token_stands_for_many_equal_ones(settings) -> None:
    config = pretrain_dit.CLIPTextConfig(hidden_size=5, projection_dim=5, num_attention_heads=1)
    transformer = pretrain_dit.new_transformer(pretrain_dit.Settings(**settings), config).eval()
    torch.manual_seed(0)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    images, timesteps, pooled = torch.randn(2, 8, 16, 16), torch.tensor([10.0, 700.0]), torch.randn(2, 10)
    text, last = torch.randn(2, 3, 10), torch.randn(2, 1, 10)

    def predict(count: int, **joint) -> torch.Tensor:
        embeds = torch.cat([text, last.expand(-1, count, -1)], dim=1)
        return transformer(images, embeds, pooled, timesteps, joint_attention_kwargs=joint).sample

    with torch.no_grad():
        many = predict(7)
        transformer.set_attn_processor(pretrain_dit.RepeatedTokenAttnProcessor())
        repeated = predict(1, repeats=torch.tensor([7.0, 7.0]))
        assert not torch.allclose(predict(1, repeats=torch.ones(2)), many, atol=1e-3)
    torch.testing.assert_close(repeated, many, rtol=1e-4, atol=1e-4)  # other float32 sums


def test_the_measure_takes_a_pipeline_of_either_kind(settings, tmp_path) -> None:
    pretrain_dit.main(pretrain_dit.Settings(**settings | {"steps": 1}))
    args = evaluate.argparse.Namespace(seed=0, num_inference_steps=1, guidance_scale=2.0, guidance_rescale=0.7)
    scenes = pretrain.draw_scenes(pretrain.random.Random(0), 2)
    for folder in (tmp_path / "model", EMOJI / "model"):
        pipe = evaluate.load_pipeline(folder)
        assert [image.size for image in evaluate.generate(pipe, scenes, args)] == [(64, 64)] * 2


# -------------------------------------------------------------------------------------------------- the shipped model


def test_shipped_transformer_paints_the_background_it_is_asked_for_and_takes_coefficients() -> None:
    folder = EMOJI / "model_dit"
    shipped, shared = ({f.read_bytes() for f in path.rglob("*.*")} for path in (folder, EMOJI / "model"))
    assert sum(map(len, shipped - shared)) <= 16e6  # git keeps a file and its copies once
    pipe = evaluate.load_pipeline(folder)
    args = evaluate.argparse.Namespace(seed=0, num_inference_steps=8, guidance_scale=2.5, guidance_rescale=0.7)
    scenes = [Scene("pig face", background) for background in ("blue", "yellow", "green", "red")]
    images = evaluate.generate(pipe, scenes, args)
    assert [evaluate.name_background(image) for image in images] == [scene.background for scene in scenes]
    add_coeff_adapter(pipe.transformer)
    assert sum(parameter.numel() for parameter in coeff_parameters(pipe.transformer)) == 192
