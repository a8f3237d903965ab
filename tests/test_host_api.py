"""What a host's own methods do to coefficients: they go on, or it is said."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import (
    FasterCacheConfig,
    LayerSkipConfig,
    PyramidAttentionBroadcastConfig,
    T5FilmDecoder,
    apply_faster_cache,
    apply_layer_skip,
    apply_pyramid_attention_broadcast,
)
from diffusers.models.attention_processor import (
    AttnAddedKVProcessor,
    AttnAddedKVProcessor2_0,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
)
from hosts import HOSTS, randomise, visible
from model_zoo import build, call
from peft import LoraConfig
from torch import nn

from coeff_diffusers import (
    CoeffAttnProcessor,
    CoeffConfig,
    add_coeff_adapter,
    check_coeff_adapters,
    coeff_disabled,
    coeff_parameters,
    list_coeff_adapters,
    save_coeff_weights,
    set_coeff_adapters,
    unload_coeff_weights,
)
from coeff_diffusers.layers import attention_layers

UNET = HOSTS["unet"]
LORA = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)


@torch.no_grad()
def run(model: nn.Module, host: str = "unet") -> torch.Tensor:
    return HOSTS[host].run(model)


@pytest.fixture
def tuned(unet) -> nn.Module:
    """A UNet with coefficients on all layers."""
    add_coeff_adapter(unet)
    randomise(unet)
    return unet


def problems(model) -> list[str]:
    return [line for line in check_coeff_adapters(model) if line.startswith("problem")]


def load_ip_adapter(unet: nn.Module) -> None:
    """As `load_ip_adapter` of a pipeline ends, with random weights."""
    torch.manual_seed(2)
    state = {"image_proj": {"proj.weight": torch.randn(4 * 16, 6), "proj.bias": torch.zeros(4 * 16)}}
    state["image_proj"] |= {"norm.weight": torch.ones(16), "norm.bias": torch.zeros(16)}
    crossing = [layer for path, layer in attention_layers(unet).items() if path.endswith("attn2")]
    state["ip_adapter"] = {
        f"{2 * index + 1}.to_{name}_ip.weight": torch.randn(layer.inner_dim, 16)
        for index, layer in enumerate(crossing)
        for name in "kv"
    }
    unet._load_ip_adapter_weights([state])


@torch.no_grad()
def run_with_image(unet: nn.Module) -> torch.Tensor:
    image = torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(4))
    inputs = UNET.inputs() | {"added_cond_kwargs": {"image_embeds": [image]}}
    return unet(**inputs, return_dict=False)[0]


def test_an_ip_adapter_loaded_before_works_and_its_scale_is_still_heard(unet) -> None:
    load_ip_adapter(unet)
    add_coeff_adapter(unet)
    randomise(unet)
    found = [p for p in unet.attn_processors.values() if isinstance(p, IPAdapterAttnProcessor2_0)]
    assert len(found) == 4
    out = run_with_image(unet)
    for processor in found:  # as set_ip_adapter_scale does
        processor.scale[0] = 0.0
    assert (run_with_image(unet) - out).norm() > 1e-2 * out.norm()
    assert problems(unet) == []


def test_the_scale_of_flux_s_ip_adapter_goes_to_the_wrapped_processor() -> None:
    wrapper = CoeffAttnProcessor(2, IPAdapterAttnProcessor2_0(8, 6))
    wrapper.scale = [0.3]
    assert wrapper.processor.scale == wrapper.scale == [0.3]
    assert not hasattr(CoeffAttnProcessor(2), "scale")


LOSSES = {
    "load_ip_adapter": load_ip_adapter,
    "set_attn_processor": lambda unet: unet.set_attn_processor(AttnProcessor2_0()),
    "set_default_attn_processor": lambda unet: unet.set_default_attn_processor(),
    "set_attention_slice": lambda unet: unet.set_attention_slice("max"),
    "fuse_qkv_projections": lambda unet: (
        unet.fuse_qkv_projections(),
        unet.set_attn_processor(FusedAttnProcessor2_0()),  # as a pipeline's method does
    ),
}


@pytest.mark.parametrize("lose", LOSSES.values(), ids=LOSSES)
def test_lost_processors_are_noticed_everywhere(tuned, lose, tmp_path) -> None:
    for model in (tuned, copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned))):
        lose(model)
        assert len(problems(model)) == 8
        assert "lost its coefficients, its processor is now" in problems(model)[0]
        with pytest.raises(RuntimeError, match="was replaced by .*set_coeff_adapters.*unload_coeff_weights"):
            (run_with_image if lose is load_ip_adapter else run)(model)
        for use in (list_coeff_adapters, coeff_parameters, lambda m: save_coeff_weights(m, tmp_path)):
            with pytest.raises(ValueError, match=r"8 layers with coefficients were replaced(.|\n)*attn1 \(now "):
                use(model)
        unload_coeff_weights(model)
        assert not any(layer._forward_pre_hooks for layer in attention_layers(model).values())
        assert problems(model) == ["problem: UNet2DConditionModel has no coefficients"]


def test_what_is_noted_of_lost_coefficients_ends_with_the_model(tuned) -> None:
    twin = copy.deepcopy(tuned)
    lost = [weakref.ref(parameter) for parameter in coeff_parameters(twin)]
    twin.set_attn_processor(AttnProcessor2_0())
    assert all(parameter() is not None for parameter in lost)
    del twin
    gc.collect()
    assert all(parameter() is None for parameter in lost)


def test_some_lost_processors_are_noticed(unet) -> None:
    add_coeff_adapter(unet, CoeffConfig(kinds=("cross",)))
    load_ip_adapter(unet)
    assert len(problems(unet)) == 4
    with pytest.raises(ValueError, match="4 layers with coefficients were replaced"):
        save_coeff_weights(unet, "nowhere")


def test_coefficients_go_on_over_an_ip_adapter_loaded_and_unloaded_later(tuned) -> None:
    expected = run(tuned)
    parameters = coeff_parameters(tuned)
    load_ip_adapter(tuned)
    set_coeff_adapters(tuned, "default")
    assert all(one is other for one, other in zip(coeff_parameters(tuned), parameters, strict=True))
    assert problems(tuned) == []
    with_image = run_with_image(tuned)
    assert (with_image - expected).norm() > 1e-2 * expected.norm()
    ip_processors = [p.processor for p in tuned.attn_processors.values() if isinstance(p, IPAdapterAttnProcessor2_0)]
    for processor in ip_processors:
        processor.scale[0] = 0.0
    torch.testing.assert_close(run_with_image(tuned), expected, rtol=1e-4, atol=1e-4)  # no mask in IP-Adapter's call
    tuned.encoder_hid_proj = None
    tuned.config.encoder_hid_dim_type = None
    tuned.set_attn_processor({name: AttnProcessor2_0() for name in tuned.attn_processors})  # as unload_ip_adapter
    set_coeff_adapters(tuned, "default")
    torch.testing.assert_close(run(tuned), expected, rtol=0, atol=0)


def test_coefficients_go_on_over_fused_projections(tuned) -> None:
    expected = run(tuned)
    LOSSES["fuse_qkv_projections"](tuned)
    set_coeff_adapters(tuned, "default")
    torch.testing.assert_close(run(tuned), expected, rtol=1e-4, atol=1e-4)  # one larger product
    unload_coeff_weights(tuned)
    assert all(isinstance(layer.processor, FusedAttnProcessor2_0) for layer in attention_layers(tuned).values())


def test_fused_before_and_unfused_after(unet) -> None:
    unet.fuse_qkv_projections()
    add_coeff_adapter(unet)
    randomise(unet)
    expected = run(unet)
    unet.unfuse_qkv_projections()
    with pytest.raises(RuntimeError, match="was replaced by"):
        run(unet)
    set_coeff_adapters(unet, "default")
    torch.testing.assert_close(run(unet), expected, rtol=1e-4, atol=1e-4)


def test_flux_fuses_and_unfuses_under_its_coefficients() -> None:
    torch.manual_seed(0)
    flux = visible(HOSTS["flux"].build().eval())
    add_coeff_adapter(flux)
    randomise(flux)
    expected = run(flux, "flux")
    flux.fuse_qkv_projections()
    torch.testing.assert_close(run(flux, "flux"), expected, rtol=1e-4, atol=1e-4)  # one larger product
    flux.unfuse_qkv_projections()
    torch.testing.assert_close(run(flux, "flux"), expected, rtol=0, atol=0)


def test_sliced_attention_cannot_take_the_coefficients_over(tuned) -> None:
    tuned.set_attention_slice("max")
    with pytest.raises(ValueError, match="compute their own softmax"):
        set_coeff_adapters(tuned, "default")
    unload_coeff_weights(tuned)
    run(tuned)


def test_the_way_out_of_sliced_attention_works_on_layers_of_either_kind() -> None:
    deepfloyd = "UNet2DConditionModel (text among the keys)"
    for name, processor, sliced, plain in (
        (deepfloyd, AttnAddedKVProcessor2_0, "SlicedAttnAddedKVProcessor", AttnAddedKVProcessor),
        ("UNet2DConditionModel", AttnProcessor2_0, "SlicedAttnProcessor", AttnProcessor),
    ):
        model = build(name)
        model.set_attn_processor(plain())
        way = rf"call model.set_attn_processor\({processor.__name__}\(\)\)"
        with pytest.raises(ValueError, match=rf"First {way}:\n.*attentions.*\({plain.__name__}\)"):
            add_coeff_adapter(model)
        model.set_attn_processor(processor())
        add_coeff_adapter(model)
        randomise(model)
        with torch.no_grad():
            expected = call(name, model)
            model.set_attention_slice("max")
            with pytest.raises(RuntimeError, match=f"was replaced by {sliced}.*: {way}, then set_coeff_adapters"):
                call(name, model)
            model.set_attn_processor(processor())
            set_coeff_adapters(model, "default")
            torch.testing.assert_close(call(name, model), expected, rtol=0, atol=0)


def test_unscaled_layers_are_not_told_to_take_a_processor_that_scales() -> None:
    decoder = T5FilmDecoder(input_dims=4, d_model=8, num_layers=1, num_heads=2, d_kv=4, d_ff=8)
    with pytest.raises(ValueError, match=r"First leave such layers out, by CoeffConfig\(exclude=...\): no other"):
        add_coeff_adapter(decoder)


def test_tied_coefficients_stay_tied_over_different_processors(unet) -> None:
    alike = visible(type(unet).from_config({**unet.config, "attention_head_dim": 4}).eval())
    alike.set_attn_processor(CoeffAttnProcessor(4))
    add_coeff_adapter(alike, adapter_name="noted")
    randomise(alike, "noted")
    (parameter,) = coeff_parameters(alike, "noted")
    expected = run(alike)
    alike.set_attn_processor({name: AttnProcessor2_0() for name in alike.attn_processors})
    with pytest.raises(RuntimeError, match="was replaced by AttnProcessor2_0"):
        run(alike)
    set_coeff_adapters(alike, "noted")
    assert coeff_parameters(alike, "noted") == [parameter]
    torch.testing.assert_close(run(alike), expected, rtol=0, atol=0)


def test_xformers_is_not_there_or_refused(tuned) -> None:
    with pytest.raises((ModuleNotFoundError, ValueError)):
        tuned.enable_xformers_memory_efficient_attention()
    assert problems(tuned) == []


def model_offload(model) -> nn.Module:
    cpu_offload_with_hook(model, execution_device=torch.device("cpu"))
    return model


def group_offload(model) -> nn.Module:
    model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    return model


def sequential_offload(model) -> nn.Module:
    cpu_offload(model, execution_device=torch.device("cpu"))
    return model


@pytest.mark.parametrize("attached_first", [True, False])
@pytest.mark.parametrize("offload", [model_offload, sequential_offload, group_offload])
def test_offloading(unet, offload, attached_first) -> None:
    base = run(unet)
    twin = copy.deepcopy(unet)
    add_coeff_adapter(twin)
    randomise(twin)
    expected = run(twin)
    if not attached_first:
        offload(unet)
    add_coeff_adapter(unet)
    randomise(unet)
    if attached_first:
        offload(unet)
    torch.testing.assert_close(run(unet), expected, rtol=0, atol=0)
    with coeff_disabled(unet):
        torch.testing.assert_close(run(unet), base, rtol=0, atol=0)
    assert problems(unet) == []


@pytest.mark.parametrize("host", ["unet", "flux"])
def test_layerwise_casting_leaves_coefficients_float32(host) -> None:
    torch.manual_seed(0)
    model = visible(HOSTS[host].build().eval())
    add_coeff_adapter(model)
    randomise(model)
    expected = [p.detach().clone() for p in coeff_parameters(model)]
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    mixed = run(model, host)
    with coeff_disabled(model):
        assert (run(model, host) - mixed).norm() > 1e-2 * mixed.norm()
    torch.testing.assert_close([p.detach() for p in coeff_parameters(model)], expected, rtol=0, atol=0)


def test_pyramid_attention_broadcast_repeats_mixed_attention(tuned) -> None:
    expected = run(tuned)
    step = [900]
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 800),
        spatial_attention_block_identifiers=("transformer_blocks",),
        current_timestep_callback=lambda: step[0],
    )
    apply_pyramid_attention_broadcast(tuned, config)
    torch.testing.assert_close(run(tuned), expected, rtol=0, atol=0)
    step[0] = 500
    torch.testing.assert_close(run(tuned), expected, rtol=0, atol=0)  # the same inputs, so the same attention


def test_faster_cache_repeats_mixed_attention() -> None:
    model = build("CogVideoXTransformer3DModel")
    add_coeff_adapter(model)
    randomise(model)
    with torch.no_grad():
        expected = call("CogVideoXTransformer3DModel", model)
    step = [900]
    config = FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 681),
        current_timestep_callback=lambda: step[0],
        attention_weight_callback=lambda _: 1.0,
        tensor_format="BFCHW",
        is_guidance_distilled=True,
    )
    apply_faster_cache(model, config)
    with torch.no_grad():
        for step[0] in (900, 800):  # fill the cache
            call("CogVideoXTransformer3DModel", model)
        step[0] = 500
        torch.testing.assert_close(call("CogVideoXTransformer3DModel", model), expected, rtol=0, atol=0)


@pytest.mark.parametrize("attached_first", [True, False])
def test_layer_skip_takes_the_base_model_s_maps_for_the_identity(attached_first) -> None:
    """As the perturbed branch of guidance is defined, coefficients or not."""
    torch.manual_seed(0)
    pixart = visible(HOSTS["pixart"].build().eval())
    config = LayerSkipConfig(
        [1], "transformer_blocks", skip_attention=False, skip_attention_scores=True, skip_ff=False
    )
    twin = copy.deepcopy(pixart)
    apply_layer_skip(twin, config)
    skipped = run(twin, "pixart")
    if attached_first:
        add_coeff_adapter(pixart, CoeffConfig(include="transformer_blocks.1.attn1"))
    apply_layer_skip(pixart, config)
    if not attached_first:
        add_coeff_adapter(pixart, CoeffConfig(include="transformer_blocks.1.attn1"))
    randomise(pixart)
    torch.testing.assert_close(run(pixart, "pixart"), skipped, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("host", ["unet", "flux"])
def test_compiled_blocks_are_eager(host) -> None:
    torch.manual_seed(0)
    model = visible(HOSTS[host].build().eval())
    add_coeff_adapter(model)
    randomise(model)
    expected = run(model, host)
    torch._dynamo.reset()
    model.compile_repeated_blocks(backend="aot_eager")
    torch.testing.assert_close(run(model, host), expected, rtol=1e-4, atol=1e-4)  # other sums
    with torch.no_grad():
        for parameter in coeff_parameters(model):
            parameter.mul_(2)
    assert (run(model, host) - expected).norm() > 1e-2 * expected.norm()


def test_peft_leaves_coefficients_trainable(tuned) -> None:
    tuned.add_adapter(LORA)
    assert problems(tuned) == []
    UNET.run(tuned).square().mean().backward()
    assert all(parameter.grad is not None for parameter in coeff_parameters(tuned))


def test_frozen_coefficients_are_reported(tuned) -> None:
    coeff_parameters(tuned)[0].requires_grad_(False)
    assert problems(tuned) == [
        "problem: 1 of 8 matrices of adapter 'default' are frozen and will not train: "
        "for p in coeff_parameters(model): p.requires_grad_(True)"
    ]


@pytest.mark.parametrize("coeff_first", [True, False])
def test_lora_is_loaded_fused_and_unfused_beside_coefficients(unet, coeff_first, tmp_path) -> None:
    donor = copy.deepcopy(unet)
    torch.manual_seed(1)
    donor.add_adapter(LORA)
    donor.save_lora_adapter(tmp_path)
    for attach in (add_coeff_adapter, None) if coeff_first else (None, add_coeff_adapter):
        if attach is None:
            unet.load_lora_adapter(tmp_path, weight_name="pytorch_lora_weights.safetensors", prefix=None)
        else:
            attach(unet)
            randomise(unet)
    both = run(unet)
    unet.fuse_lora()
    torch.testing.assert_close(run(unet), both, rtol=1e-4, atol=1e-4)  # weights added before the product
    unet.unfuse_lora()
    unet.unload_lora()
    alone = run(unet)
    assert (both - alone).norm() > 1e-2 * both.norm()
    assert not any("lost" in line for line in problems(unet))


def test_a_healthy_adapter_has_no_problem(tuned) -> None:
    assert check_coeff_adapters(tuned) == [
        "ok: 8 of 8 attention layers have coefficients",
        "ok: adapter 'default' is active with weight 1.0",
        "ok: adapter 'default' is trainable, 56 coefficients",
    ]


def test_each_finding_has_its_line(unet) -> None:
    assert check_coeff_adapters(unet) == ["problem: UNet2DConditionModel has no coefficients"]
    add_coeff_adapter(unet, adapter_name="a")
    assert "ok: adapter 'a' is active, and all of its coefficients are 0: the base model" in check_coeff_adapters(unet)
    add_coeff_adapter(unet, CoeffConfig(kinds=("cross",)), adapter_name="b")
    assert problems(unet) == [
        "problem: adapter 'a' is not active, or active with weight 0: see set_coeff_adapters",
    ]
    set_coeff_adapters(unet, ["a", "b"])
    with coeff_disabled(unet):
        assert problems(unet) == ["problem: coefficients are switched off (coeff_disabled)"]
    coeff_parameters(unet, "a")[0].data.fill_(float("nan"))
    assert problems(unet) == ["problem: adapter 'a' has values that are not finite"]


def test_the_backend_is_reported() -> None:
    flux = HOSTS["flux"].build()
    add_coeff_adapter(flux)
    for layer in attention_layers(flux).values():
        layer.set_attention_backend("_native_math")
    assert "ok: attention backend '_native_math'" in check_coeff_adapters(flux)
    flux.transformer_blocks[0].attn.set_attention_backend("sage")
    assert problems(flux) == [
        "problem: attention backend 'sage' hands out no maps to mix: model.set_attention_backend('native')"
    ]
