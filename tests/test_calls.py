"""Which calls for attention are mixed, of processors that make several, and which are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import CosmosTransformer3DModel
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.attention_processor import (
    Attention,
    IPAdapterAttnProcessor2_0,
    JointAttnProcessor2_0,
    PAGJointAttnProcessor2_0,
    SD3IPAdapterJointAttnProcessor2_0,
)
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor, FluxIPAdapterAttnProcessor
from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor
from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2Attention, SkyReelsV2AttnProcessor
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from hosts import HOSTS, randomise, visible
from model_zoo import MODELS, build, call

from coeff_diffusers import CoeffAttnProcessor, add_coeff_adapter
from coeff_diffusers import processor as processor_module
from coeff_diffusers.layers import attention_layers


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def unet_layer(image: bool):
    torch.manual_seed(0)
    attn = visible(Attention(query_dim=8, cross_attention_dim=6, heads=2, dim_head=4))
    processor = visible(IPAdapterAttnProcessor2_0(8, 6, num_tokens=(3,), scale=0.7 if image else 0.0))
    return attn, processor, {"encoder_hidden_states": (draw(2, 5, 6), [draw(2, 1, 3, 6)])}


def sd3_layer(image: bool):
    torch.manual_seed(0)
    attn = visible(
        Attention(query_dim=8, added_kv_proj_dim=8, heads=2, dim_head=4, context_pre_only=False, qk_norm="rms_norm")
    )
    processor = visible(SD3IPAdapterJointAttnProcessor2_0(8, 6, 4, timesteps_emb_dim=5, scale=0.7))
    kwargs = {"encoder_hidden_states": draw(2, 5, 8), "ip_hidden_states": draw(2, 3, 6), "temb": draw(2, 5)}
    return attn, processor, kwargs if image else {**kwargs, "ip_hidden_states": None}


def flux_layer(image: bool):
    torch.manual_seed(0)
    attn = visible(FluxAttention(query_dim=8, heads=2, dim_head=4, added_kv_proj_dim=8, context_pre_only=False))
    if not image:
        return attn, FluxAttnProcessor(), {"encoder_hidden_states": draw(2, 5, 8)}
    processor = visible(FluxIPAdapterAttnProcessor(8, 6, num_tokens=(3,), scale=0.7))
    return attn, processor, {"encoder_hidden_states": draw(2, 5, 8), "ip_hidden_states": [draw(2, 3, 6)]}


def video_layer(attention, processor):
    def layer(image: bool):
        torch.manual_seed(0)
        attn = visible(attention(dim=8, heads=2, dim_head=4, added_kv_proj_dim=8, cross_attention_dim_head=4))
        text = draw(2, 512, 8)  # the length of text that these processors count on
        if not image:
            attn.add_k_proj = None
        return attn, processor(), {"encoder_hidden_states": torch.cat([draw(2, 3, 8), text], 1) if image else text}

    return layer


LAYERS = {
    "unet": unet_layer,
    "sd3": sd3_layer,
    "flux": flux_layer,
    "wan": video_layer(WanAttention, WanAttnProcessor),
    "skyreels": video_layer(SkyReelsV2Attention, SkyReelsV2AttnProcessor),
}


def run(layer, image: bool, delta: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    attn, processor, kwargs = layer(image)
    wrapper = CoeffAttnProcessor(2, processor)
    wrapper.enabled = delta is not None
    if delta is not None:
        wrapper.coeff["default"].data.copy_(delta)
    with torch.no_grad():
        out = wrapper(attn, draw(2, 7, 8), **kwargs)
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_coefficients_mean_the_same_with_an_image_prompt(layer) -> None:
    delta = draw(2, 2)
    with_image, base_with_image = run(layer, True, delta), run(layer, True, None)
    without, base = run(layer, False, delta), run(layer, False, None)
    assert (with_image[0] - without[0]).norm() > 0.1 or len(with_image) > len(without)
    for one, two, three, four in zip(with_image, base_with_image, without, base):
        assert (three - four).norm() > 0.1
        torch.testing.assert_close(one - two, three - four, rtol=1e-4, atol=1e-5)  # another order of sums
    if len(with_image) > len(without):  # FLUX hands the prompt's part out by itself
        torch.testing.assert_close(with_image[-1], base_with_image[-1], rtol=0, atol=0)


def test_the_perturbed_half_of_guidance_is_left_alone() -> None:
    attn, _, _ = sd3_layer(False)
    wrapper = CoeffAttnProcessor(2, PAGJointAttnProcessor2_0())
    wrapper.coeff["default"].data.copy_(draw(2, 2))
    kwargs = {"encoder_hidden_states": draw(2, 5, 8)}
    attn.norm_q = attn.norm_k = attn.norm_added_q = attn.norm_added_k = None  # which this processor does not ask for
    with torch.no_grad():
        mixed = wrapper(attn, draw(2, 7, 8), **kwargs)[0]
        base = wrapper.processor(attn, draw(2, 7, 8), **kwargs)[0]
    torch.testing.assert_close(mixed[1:], base[1:], rtol=0, atol=0)
    assert (mixed[:1] - base[:1]).norm() > 0.1


@pytest.fixture
def mixed_calls(monkeypatch) -> list[int]:
    """Grows by one with every call that is mixed."""
    calls: list[int] = []
    mix = processor_module.mixed_attention
    monkeypatch.setattr(processor_module, "mixed_attention", lambda *args, **kw: calls.append(1) or mix(*args, **kw))
    return calls


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("MochiTransformer3DModel", 2),  # one a sample
        ("Cosmos3OmniTransformer", 2),  # text, then image
        ("StableAudio3DiTModel", 2),  # two whose outcomes are subtracted
        ("FluxTransformer2DModel", 1),
        ("WanAnimateTransformer3DModel", 1),  # text; the image's is the base model's
        ("WanAnimate2Transformer3DModel", 1),
    ],
)
def test_every_call_of_the_layer_s_own_is_mixed(name, calls, mixed_calls) -> None:
    model = build(name)
    add_coeff_adapter(model)
    call(name, model)
    assert len(mixed_calls) == calls * len(attention_layers(model))


def test_both_calls_of_flux_2_for_reference_images_are_mixed(mixed_calls) -> None:
    model = build("Flux2Transformer2DModel")
    model.transformer_blocks[0].attn.set_processor(Flux2KVAttnProcessor())
    model.single_transformer_blocks[0].attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    add_coeff_adapter(model)
    model(**MODELS["Flux2Transformer2DModel"][1](draw), kv_cache_mode="extract", num_ref_tokens=2)
    assert len(mixed_calls) == 2 * 2


def test_the_image_s_call_of_cosmos_2_5_is_left_alone(mixed_calls) -> None:
    config, inputs = MODELS["CosmosTransformer3DModel"]
    model = CosmosTransformer3DModel(**config, img_context_dim_in=8, img_context_num_tokens=3, img_context_dim_out=24)
    add_coeff_adapter(model)
    model(**inputs(draw) | {"encoder_hidden_states": (draw(2, 5, 8), draw(2, 3, 8)), "attention_mask": None})
    assert len(mixed_calls) == 2  # self-attention and the text


def test_another_count_of_heads_is_named() -> None:
    attn = Attention(query_dim=8, heads=2, dim_head=4)
    with pytest.raises(RuntimeError, match=r"AttnProcessor2_0 asks for .* \(2, 2, 7, 4\), .*\(batch, 3 heads"):
        CoeffAttnProcessor(3)(attn, draw(2, 7, 8))


@pytest.fixture
def flux():
    torch.manual_seed(0)
    model = visible(HOSTS["flux"].build().eval())
    add_coeff_adapter(model)
    randomise(model)
    return model


@torch.no_grad()
def output(model) -> torch.Tensor:
    return HOSTS["flux"].run(model)


@pytest.mark.parametrize("backend", ["native", "_native_math", "_native_efficient"])
def test_native_backends_are_mixed(flux, backend) -> None:
    expected = output(flux)
    flux.set_attention_backend(backend)
    torch.testing.assert_close(output(flux), expected, rtol=0, atol=0)


def test_another_backend_is_refused_before_it_runs(flux) -> None:
    expected = output(flux)
    flux.set_attention_backend("flex")
    with pytest.raises(RuntimeError, match=r"backend 'flex' hands out no maps.*set_attention_backend\('native'\)"):
        output(flux)
    flux.set_attention_backend("native")
    torch.testing.assert_close(output(flux), expected, rtol=0, atol=0)


def test_a_backend_for_all_is_refused(flux) -> None:
    with attention_backend("flex"), pytest.raises(RuntimeError, match="no other attention_backend.* around the call"):
        output(flux)


def test_context_parallelism_is_refused(flux) -> None:
    flux.transformer_blocks[0].attn.processor._parallel_config = object()
    with pytest.raises(RuntimeError, match="under context parallelism no device has the maps of all heads"):
        output(flux)


def test_the_host_sees_the_wrapped_processor() -> None:
    wrapper = CoeffAttnProcessor(2, JointAttnProcessor2_0())
    assert isinstance(wrapper, JointAttnProcessor2_0)
    assert isinstance(wrapper, CoeffAttnProcessor)
    assert isinstance(copy.deepcopy(wrapper), CoeffAttnProcessor)
    assert wrapper.__class__ is JointAttnProcessor2_0
    assert repr(wrapper).startswith("CoeffAttnProcessor(")
