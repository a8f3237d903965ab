"""Every model class that diffusers exports keeps the contract, or is listed with the reason why it cannot."""

from __future__ import annotations

import copy

import pytest
import torch
from hosts import randomise
from model_zoo import CONFIGS, MODELS, NOT_SERVED, REQUIRES, build, call, class_name, model_classes

from coeff_diffusers import (
    add_coeff_adapter,
    coeff_parameters,
    load_coeff_weights,
    save_coeff_weights,
    unload_coeff_weights,
)
from coeff_diffusers.layers import attention_kind, attention_layers


@pytest.mark.parametrize("name", sorted(model_classes()))
def test_every_exported_class_is_tested_or_listed(name) -> None:
    assert (name in MODELS) != (name in NOT_SERVED), (
        f"{name} must have a config in MODELS, or a reason in NOT_SERVED, of tests/model_zoo.py"
    )


@pytest.mark.parametrize("name", [name for name in MODELS if class_name(name) in model_classes()])
def test_contract(name, tmp_path) -> None:
    pytest.importorskip(REQUIRES.get(name, "torch"))
    model = build(name)
    fresh = copy.deepcopy(model)
    keys = list(model.state_dict())
    processors = {path: layer.processor for path, layer in attention_layers(model).items()}
    with torch.no_grad():
        base = call(name, model)

    add_coeff_adapter(model, CONFIGS.get(name))
    with torch.no_grad():
        # another order of float32 sums, amplified by large random weights
        torch.testing.assert_close(call(name, model), base, rtol=1e-3, atol=1e-3)

    randomise(model)
    out = call(name, model)
    assert (out - base).norm() > 1e-3 * base.norm()

    out.square().mean().backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad is None, path
    for parameter in coeff_parameters(model):
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.ne(0).all()

    save_coeff_weights(model, tmp_path)
    load_coeff_weights(fresh, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(call(name, fresh), out, rtol=0, atol=0)

    assert list(model.state_dict()) == keys
    unload_coeff_weights(model)
    assert list(model.state_dict()) == keys
    for path, layer in attention_layers(model).items():
        assert layer.processor is processors[path], path
    with torch.no_grad():
        torch.testing.assert_close(call(name, model), base, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "path", "kind"),
    [
        ("WanTransformer3DModel", "blocks.0.attn1", "self"),
        ("WanTransformer3DModel", "blocks.0.attn2", "cross"),
        ("WanAnimateTransformer3DModel", "blocks.0.attn2", "cross"),  # projections for the image's keys alone
        ("WanAnimateTransformer3DModel", "face_adapter.0", "cross"),
        ("UNet3DConditionModel", "down_blocks.0.temp_attentions.0.transformer_blocks.0.attn2", "self"),
        ("LTX2VideoTransformer3DModel", "transformer_blocks.0.audio_to_video_attn", "cross"),
        ("LTX2VideoTransformer3DModel", "transformer_blocks.0.audio_attn1", "self"),
        ("MochiTransformer3DModel", "transformer_blocks.0.attn1", "joint"),
        ("CogVideoXTransformer3DModel", "transformer_blocks.0.attn1", "joint"),
        ("Flux2Transformer2DModel", "single_transformer_blocks.0.attn", "joint"),
        ("UNet2DConditionModel (text among the keys)", "mid_block.attentions.0", "joint"),
        ("OmniGenTransformer2DModel", "layers.0.self_attn", "joint"),
        ("ZImageTransformer2DModel", "context_refiner.0.attention", "self"),
        ("ZImageTransformer2DModel", "layers.0.attention", "joint"),
    ],
)
def test_kinds(name, path, kind) -> None:
    assert attention_kind(path, build(name).get_submodule(path)) == kind


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        (
            "UNet1DModel",
            {"block_out_channels": (8, 8, 16), "sample_size": 16},
            r"UNet1DModel has no attention layer with a processor to wrap; its attention is in .*SelfAttention1d",
        ),
        (
            "T5FilmDecoder",
            {"input_dims": 4, "d_model": 8, "num_layers": 1, "num_heads": 2, "d_kv": 4, "d_ff": 8},
            r"compute their own softmax(.|\n)*AttnProcessor",
        ),
        (
            "Kandinsky6SRTransformer3DModel",
            {"in_visual_dim": 4, "model_dim": 8, "ff_dim": 8, "num_visual_blocks": 1, "axes_dims": (4, 2, 2)},
            r"cannot be served:\n.*Kandinsky6SRAttnProcessor\): FlexAttention, whose maps cannot be had",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(name, config, message) -> None:
    model = model_classes()[name](**config)
    with pytest.raises(ValueError, match=message):
        add_coeff_adapter(model)


def test_a_file_with_coefficients_for_linear_attention_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"transformer_blocks.0.attn1.coeff: is linear attention, which forms no maps"
    ):
        load_coeff_weights(
            build("SanaTransformer2DModel"), {"transformer.transformer_blocks.0.attn1.coeff": torch.zeros(2, 2)}
        )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("AnyFlowFARTransformer3DModel", "blocks.0.attn1 (AnyFlowCausalAttnProcessor): FlexAttention"),
        ("MochiTransformer3DModel", "time_embed.pooler (MochiAttentionPool): attention outside a processor"),
        ("ControlNetUnionModel", "(ResidualAttentionBlock): attention outside a processor"),
    ],
)
def test_what_is_left_out_is_named(name, message, caplog) -> None:
    add_coeff_adapter(build(name))
    assert message in caplog.text
