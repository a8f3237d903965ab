"""Names, weights, selection, pipelines, and what is refused."""

from __future__ import annotations

import copy
import inspect
import pickle

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from hosts import HOSTS, randomise, visible
from torch import nn

from coeff_diffusers import (
    CoeffAttnProcessor,
    CoeffConfig,
    add_coeff_adapter,
    coeff_adapters,
    coeff_disabled,
    coeff_parameters,
    delete_coeff_adapters,
    disable_coeff_adapters,
    enable_coeff_adapters,
    get_active_coeff_adapters,
    list_coeff_adapters,
    load_coeff_weights,
    save_coeff_weights,
    set_coeff_adapters,
    unload_coeff_weights,
)
from coeff_diffusers.adapters import denoisers
from coeff_diffusers.layers import attention_layers

UNET = HOSTS["unet"]


@torch.no_grad()
def run(model: nn.Module) -> torch.Tensor:
    return UNET.run(model)


class TinyPipeline(DiffusionPipeline):
    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)


def test_for_model_fits_set_attn_processor_and_is_left_whole_by_it(unet) -> None:
    processors = CoeffAttnProcessor.for_model(unet, CoeffConfig(include="attn2"))
    unet.set_attn_processor(dict(processors))
    wrapped = [path for path, processor in processors.items() if isinstance(processor, CoeffAttnProcessor)]
    assert len(wrapped) == 4
    assert all(path.endswith("attn2.processor") for path in wrapped)
    assert len(coeff_parameters(unet)) == 4


def test_for_model_changes_nothing_on_the_model(unet) -> None:
    CoeffAttnProcessor.for_model(unet)
    assert list_coeff_adapters(unet) == []


def test_for_model_wants_set_attn_processor() -> None:
    with pytest.raises(ValueError, match=r"Linear has no set_attn_processor; use add_coeff_adapter"):
        CoeffAttnProcessor.for_model(nn.Linear(2, 2))


def test_one_instance_ties_the_coefficients_of_all_layers(unet) -> None:
    alike = HOSTS["unet"].build()
    alike = type(alike).from_config({**alike.config, "attention_head_dim": 4}).eval()
    alike.set_attn_processor(CoeffAttnProcessor(4))
    (parameter,) = coeff_parameters(alike)
    UNET.run(alike).sum().backward()
    assert parameter.shape == (4, 4)
    assert parameter.grad is not None
    unload_coeff_weights(alike)
    assert all(type(layer.processor) is AttnProcessor2_0 for layer in attention_layers(alike).values())


def test_a_selection_that_parts_tied_layers_is_refused(unet) -> None:
    alike = type(unet).from_config({**unet.config, "attention_head_dim": 4})
    alike.set_attn_processor(CoeffAttnProcessor(4))
    with pytest.raises(ValueError, match="share a CoeffAttnProcessor with 4 that are not selected"):
        add_coeff_adapter(alike, CoeffConfig(kinds=("cross",)), adapter_name="cross")
    assert list_coeff_adapters(alike) == ["default"]
    add_coeff_adapter(alike, adapter_name="all")
    assert len(coeff_parameters(alike, "all")) == 1


def test_adapters_add_up_with_their_weights(unet) -> None:
    for seed, name in enumerate("ab"):
        add_coeff_adapter(unet, adapter_name=name)
        randomise(unet, name, seed)
    set_coeff_adapters(unet, ["a", "b"], np.array([0.7, -1.2]))
    assert get_active_coeff_adapters(unet) == {"a": 0.7, "b": -1.2}
    out = run(unet)
    with torch.no_grad():
        for one, other in zip(coeff_parameters(unet, "a"), coeff_parameters(unet, "b"), strict=True):
            one.mul_(0.7).add_(-1.2 * other)
    set_coeff_adapters(unet, "a")
    torch.testing.assert_close(out, run(unet), rtol=1e-4, atol=1e-4)  # float32 sums in another order


def test_the_adapter_added_last_is_the_active_one(unet) -> None:
    add_coeff_adapter(unet, adapter_name="a")
    add_coeff_adapter(unet, CoeffConfig(kinds=("cross",)), adapter_name="b")
    assert list_coeff_adapters(unet) == ["a", "b"]
    assert get_active_coeff_adapters(unet) == {"b": 1.0}
    assert all(set(layer.processor.adapter_weights) <= {"b"} for layer in attention_layers(unet).values())


def test_deleting_gives_layers_without_an_adapter_their_processor_back(unet) -> None:
    original = unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor
    add_coeff_adapter(unet, adapter_name="a")
    add_coeff_adapter(unet, CoeffConfig(kinds=("cross",)), adapter_name="b")
    delete_coeff_adapters(unet, "a")
    assert list_coeff_adapters(unet) == ["b"]
    assert unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor is original


def test_disabled_restores_what_it_found_also_after_an_error(unet) -> None:
    add_coeff_adapter(unet)
    inner = unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor
    inner.enabled = False
    with pytest.raises(KeyError), coeff_disabled(unet):
        raise KeyError
    enabled = [layer.processor.enabled for layer in attention_layers(unet).values()]
    assert enabled.count(False) == 1


def test_dropout_drops_entries_of_delta_in_training_only(unet) -> None:
    add_coeff_adapter(unet, CoeffConfig(dropout=0.4))
    randomise(unet)
    processor = unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor
    delta = processor.coeff["default"]
    torch.testing.assert_close(processor.delta(), delta)
    torch.manual_seed(0)
    dropped = torch.stack([processor.delta(training=True) for _ in range(200)])
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], (delta / 0.6).expand_as(dropped)[kept])
    assert abs(kept.float().mean().item() - 0.6) < 0.03  # 3,200 draws: the standard deviation is 0.009


def test_dropout_follows_the_layer_s_mode_however_the_processor_came_there(unet) -> None:
    unet.set_attn_processor(CoeffAttnProcessor.for_model(unet, CoeffConfig(dropout=0.5)))
    randomise(unet)
    torch.testing.assert_close(run(unet), run(unet), rtol=0, atol=0)
    unet.train()
    torch.manual_seed(0)
    assert (run(unet) != run(unet)).any()


def test_a_pipeline_is_its_denoiser(unet, tmp_path) -> None:
    pipe = TinyPipeline(unet, DDIMScheduler())
    add_coeff_adapter(pipe)
    assert list_coeff_adapters(unet) == ["default"]
    unload_coeff_weights(pipe)
    assert list_coeff_adapters(unet) == []


def test_a_pipeline_s_denoisers_are_all_of_them(tmp_path) -> None:
    class TwoStages(DiffusionPipeline):
        def __init__(self, transformer, transformer_2, decoder, vae, controlnet):
            super().__init__()
            self.register_modules(
                transformer=transformer, transformer_2=transformer_2, decoder=decoder, vae=vae, controlnet=controlnet
            )

    def build() -> TwoStages:
        vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
        return TwoStages(*(HOSTS[name].build() for name in ("sd3", "pixart", "unet")), vae, HOSTS["unet"].build())

    pipe, twin = build(), build()
    add_coeff_adapter(pipe)
    randomise(pipe)
    assert [len(coeff_parameters(part)) for part in (pipe.transformer, pipe.transformer_2, pipe.decoder)] == [3, 4, 8]
    assert list_coeff_adapters(pipe.controlnet) == list_coeff_adapters(pipe.vae) == []
    load_coeff_weights(twin, save_coeff_weights(pipe, tmp_path))
    for one, other in zip(coeff_parameters(pipe), coeff_parameters(twin), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    add_coeff_adapter(pipe, components=["decoder", "controlnet"], adapter_name="second")
    assert len(coeff_parameters(pipe, "second")) == 16


def test_save_pretrained_writes_the_base_model(unet, tmp_path, caplog) -> None:
    base = run(unet)
    add_coeff_adapter(unet)
    randomise(unet)
    unet.save_pretrained(tmp_path)
    reloaded, info = type(unet).from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == info["unexpected_keys"] == info["mismatched_keys"] == []
    torch.testing.assert_close(run(reloaded.eval()), base, rtol=0, atol=0)


def test_state_dict_loads_into_a_wrapped_model(unet) -> None:
    state = copy.deepcopy(unet.state_dict())
    add_coeff_adapter(unet)
    randomise(unet)
    before = run(unet)
    assert not any(unet.load_state_dict(state))
    torch.testing.assert_close(run(unet), before, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="attn1.processor.stray"):
        unet.load_state_dict(
            {**state, "mid_block.attentions.0.transformer_blocks.0.attn1.processor.stray": torch.ones(1)}
        )


class OwnWeights(nn.Module):
    """A processor with weights of its own, as an IP-Adapter's."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(1, 1)
        self.inner = AttnProcessor2_0()

    def forward(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return self.gate.weight * self.inner(attn, hidden_states, encoder_hidden_states, attention_mask)


def test_loading_with_assign_keeps_the_parameters_that_an_optimizer_holds(unet) -> None:
    add_coeff_adapter(unet)
    before = coeff_parameters(unet)
    unet.load_state_dict(copy.deepcopy(unet.state_dict()), assign=True)
    assert all(one is other for one, other in zip(coeff_parameters(unet), before, strict=True))


@pytest.mark.parametrize("attached_first", [True, False])
def test_sequential_offload_leaves_coefficients_where_they_are(unet, attached_first) -> None:
    base = run(unet)
    twin = copy.deepcopy(unet)
    add_coeff_adapter(twin)
    randomise(twin)
    expected = run(twin)
    if attached_first:
        add_coeff_adapter(unet)
    cpu_offload(unet, execution_device=torch.device("cpu"))
    if not attached_first:
        add_coeff_adapter(unet)
    assert unet.conv_in.weight.is_meta
    randomise(unet)
    torch.testing.assert_close(run(unet), expected, rtol=0, atol=0)
    with coeff_disabled(unet):
        torch.testing.assert_close(run(unet), base, rtol=0, atol=0)


def test_a_wrapped_processor_s_own_weights_keep_their_keys(unet) -> None:
    unet.set_attn_processor({name: OwnWeights() for name in unet.attn_processors})
    base, state = run(unet), copy.deepcopy(unet.state_dict())
    add_coeff_adapter(unet)
    assert set(unet.state_dict()) == set(state)
    with torch.no_grad():
        unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor.processor.gate.weight.zero_()
    assert not any(unet.load_state_dict(state))
    with coeff_disabled(unet):
        torch.testing.assert_close(run(unet), base, rtol=0, atol=0)


def test_copies_and_pickles_keep_coefficients_of_their_own(unet) -> None:
    add_coeff_adapter(unet)
    randomise(unet)
    out = run(unet)
    for twin in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        torch.testing.assert_close(run(twin), out, rtol=0, atol=0)
        randomise(twin, seed=5)
        assert (run(twin) != out).any()
    torch.testing.assert_close(run(unet), out, rtol=0, atol=0)


def test_a_forward_without_an_attention_call_is_an_error_not_the_base(unet) -> None:
    add_coeff_adapter(unet)
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    layer.processor.processor = AttnProcessor()
    with pytest.raises(RuntimeError, match="AttnProcessor computed its attention without .* had no effect"):
        run(unet)
    with coeff_disabled(unet):
        run(unet)


@pytest.mark.parametrize("processor", [AttnProcessor(), SlicedAttnProcessor(1)])
def test_processors_with_their_own_softmax_are_refused_by_name(unet, processor) -> None:
    unet.set_attn_processor(processor)
    with pytest.raises(ValueError, match=f"compute their own softmax(.|\n)*attn1 .{type(processor).__name__}"):
        add_coeff_adapter(unet)
    assert list_coeff_adapters(unet) == []


def test_attention_backend_of_the_host_reaches_the_wrapped_processor() -> None:
    flux = HOSTS["flux"].build()
    add_coeff_adapter(flux)
    flux.set_attention_backend("_native_math")
    layer = flux.transformer_blocks[0].attn
    assert layer.processor.processor._attention_backend == "_native_math"
    assert not hasattr(CoeffAttnProcessor(2), "_attention_backend")


def test_patterns_select_by_path_and_by_the_end_of_it(unet) -> None:
    config = CoeffConfig(include=["down_blocks.*", "attn2"], exclude="mid_block.*")
    add_coeff_adapter(unet, config)
    paths = [p for p, layer in attention_layers(unet).items() if isinstance(layer.processor, CoeffAttnProcessor)]
    expected = [p for p in attention_layers(unet) if p.startswith("down") or (p.endswith("attn2") and p[0] != "m")]
    assert paths == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"include": "atn2"},
            r"\['atn2'\] match none of the 8 attention layers, of which the first is 'down_blocks.0",
        ),
        ({"exclude": ["attn1", "none"]}, r"\['none'\] match none"),
        (
            {"kinds": ("joint",)},
            r"no attention layer of UNet2DConditionModel is selected .* kinds cross, self",
        ),
        ({"include": "attn1", "exclude": "attn1"}, "no attention layer"),
    ],
    ids=str,
)
def test_a_selection_of_nothing_is_an_error(unet, config, message) -> None:
    with pytest.raises(ValueError, match=message):
        add_coeff_adapter(unet, CoeffConfig(**config))
    assert list_coeff_adapters(unet) == []


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"kinds": ("selff",)}, ValueError, r"kinds must name at least one of .*, got \['selff'\]"),
        ({"kinds": ()}, ValueError, r"kinds must name at least one"),
        ({"dropout": 1.0}, ValueError, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"include": []}, ValueError, "include must hold at least one pattern"),
        ({"exclude": [3]}, TypeError, r"exclude must be a pattern or a list of patterns \(str\), got \[3\]"),
    ],
    ids=str,
)
def test_config_checks_itself(fields, error, message) -> None:
    with pytest.raises(error, match=message):
        CoeffConfig(**fields)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda unet: add_coeff_adapter(unet), ValueError, "'default' is in use .* delete_coeff_adapters"),
        (lambda unet: add_coeff_adapter(unet, adapter_name="a.b"), ValueError, "full stop.*, got 'a.b'"),
        (lambda unet: add_coeff_adapter(unet, adapter_name=""), ValueError, "must not be empty"),
        (lambda unet: set_coeff_adapters(unet, "x"), ValueError, r"no adapter \['x'\]; it has \['default'\]"),
        (lambda unet: set_coeff_adapters(unet, ["default", "default"]), ValueError, "named twice"),
        (lambda unet: set_coeff_adapters(unet, ["default"], [1.0, 2.0]), ValueError, "need as many weights, got 2"),
        (lambda unet: set_coeff_adapters(unet, "default", float("nan")), ValueError, "must be finite"),
        (lambda unet: coeff_parameters(unet, "x"), ValueError, r"no adapter \['x'\]"),
        (lambda unet: delete_coeff_adapters(unet, ["default", "x"]), ValueError, r"no adapter \['x'\]"),
        (lambda unet: add_coeff_adapter("runwayml/sd"), TypeError, "a diffusers model or pipeline, got str"),
        (lambda unet: CoeffAttnProcessor(0), ValueError, "num_heads must be at least 1, got 0"),
        (lambda unet: CoeffAttnProcessor(2, CoeffAttnProcessor(2)), ValueError, "CoeffAttnProcessor already"),
    ],
)
def test_what_is_refused_says_why_and_changes_nothing(unet, call, error, message) -> None:
    add_coeff_adapter(unet)
    with pytest.raises(error, match=message):
        call(unet)
    assert list_coeff_adapters(unet) == ["default"]
    assert get_active_coeff_adapters(unet) == {"default": 1.0}


def test_names_that_a_module_has_are_as_good_as_any(unet) -> None:
    for name in ("train", "keys", "coeff"):
        add_coeff_adapter(unet, adapter_name=name)
    set_coeff_adapters(unet, ["train", "keys"])
    run(unet)
    assert list_coeff_adapters(unet) == ["train", "keys", "coeff"]


@pytest.mark.parametrize("call", [unload_coeff_weights, coeff_parameters, lambda u: coeff_disabled(u).__enter__()])
def test_a_model_without_coefficients_is_named(unet, call) -> None:
    with pytest.raises(ValueError, match="UNet2DConditionModel has no coefficients: add_coeff_adapter or load"):
        call(unet)


def test_a_pipeline_without_a_denoiser_is_named() -> None:
    class NoDenoiser(DiffusionPipeline):
        def __init__(self, scheduler):
            super().__init__()
            self.register_modules(scheduler=scheduler)

    with pytest.raises(ValueError, match=r"NoDenoiser has no unet or transformer; it has \['scheduler'\]"):
        add_coeff_adapter(NoDenoiser(DDIMScheduler()))


def test_sana_s_linear_attention_is_left_out_and_named(caplog) -> None:
    from diffusers import SanaTransformer2DModel

    sana = SanaTransformer2DModel(
        sample_size=8, num_layers=1, num_attention_heads=2, attention_head_dim=4, num_cross_attention_heads=2,
        cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8, in_channels=4, out_channels=4,
    )  # fmt: skip
    add_coeff_adapter(sana)
    assert "transformer_blocks.0.attn1 (SanaLinearAttnProcessor2_0): linear attention" in caplog.text
    assert len(coeff_parameters(sana)) == 1
    with pytest.raises(
        ValueError, match=r"Those selected cannot be served:\n.*attn1 .*linear attention, which forms no"
    ):
        add_coeff_adapter(sana, CoeffConfig(kinds=("self",)), adapter_name="self")


def test_importing_the_package_imports_no_training_library() -> None:
    import subprocess
    import sys

    names = ("peft", "matplotlib", "tensorboard", "transformers")
    code = f"import sys, coeff_diffusers; print([m for m in {names} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_weights_by_pattern_reach_their_layers(host, model) -> None:
    add_coeff_adapter(model)
    randomise(model)
    paths = [f"{name}.{path}" for name, part in denoisers(model).items() for path in attention_layers(part)]
    last = paths[-1]
    set_coeff_adapters(model, "default", {"*": -0.5, last.partition(".")[2]: 0.0})
    assert get_active_coeff_adapters(model) == {"default": {path: 0.0 if path == last else -0.5 for path in paths}}
    with torch.no_grad():
        out = host.run(model)
        *others, untouched = coeff_parameters(model)
        for parameter in others:
            parameter.mul_(-0.5)
        untouched.zero_()
        set_coeff_adapters(model, "default")
        torch.testing.assert_close(out, host.run(model), rtol=1e-4, atol=1e-4)  # zeros are mixed here, not skipped


def test_the_last_pattern_counts_and_layers_without_one_have_weight_1(unet) -> None:
    for name in "ab":
        add_coeff_adapter(unet, adapter_name=name)
    set_coeff_adapters(unet, ["a", "b"], [{"attn2": 0.0, "up_blocks.*": 2.0}, 0.5])
    active = get_active_coeff_adapters(unet)
    layer = "unet.{}.attentions.0.transformer_blocks.0.{}".format
    assert active["a"][layer("up_blocks.1", "attn2")] == 2.0
    assert active["a"][layer("down_blocks.0", "attn2")] == 0.0
    assert active["a"][layer("down_blocks.0", "attn1")] == 1.0
    assert active["b"] == 0.5
    before = {path: dict(p.processor.adapter_weights) for path, p in attention_layers(unet).items()}
    set_coeff_adapters(unet, "b")
    set_coeff_adapters(unet, list(active), list(active.values()))  # what was told can be set again
    assert {path: p.processor.adapter_weights for path, p in attention_layers(unet).items()} == before


def test_one_dict_of_patterns_serves_all_adapters(unet) -> None:
    for name in "ab":
        add_coeff_adapter(unet, adapter_name=name)
    set_coeff_adapters(unet, ["a", "b"], {"attn2": 0.25})
    weights = unet.mid_block.attentions[0].transformer_blocks[0].attn2.processor.adapter_weights
    assert weights == {"a": 0.25, "b": 0.25}


def test_patterns_that_fit_no_layer_of_the_adapter_are_refused(unet) -> None:
    add_coeff_adapter(unet, CoeffConfig(kinds=("cross",)))
    with pytest.raises(
        ValueError, match=r"\['attn1', 'x'\] match none of the 4 layers of adapter 'default', .*attn2'"
    ):
        set_coeff_adapters(unet, "default", {"attn2": 0.5, "attn1": 0.5, "x": 1.0})
    with pytest.raises(ValueError, match="must be finite"):
        set_coeff_adapters(unet, "default", {"attn2": float("inf")})
    assert get_active_coeff_adapters(unet) == {"default": 1.0}


def test_tied_layers_cannot_be_weighed_apart(unet) -> None:
    alike = type(unet).from_config({**unet.config, "attention_head_dim": 4})
    alike.set_attn_processor(CoeffAttnProcessor(4))
    with pytest.raises(ValueError, match="attn2 is tied to layers of weight 1.0, and cannot have 0.5"):
        set_coeff_adapters(alike, "default", {"attn2": 0.5})
    set_coeff_adapters(alike, "default", {"*": 0.5})
    assert get_active_coeff_adapters(alike) == {"default": 0.5}


def test_coeff_adapters_restores_what_it_found_also_after_an_error(unet) -> None:
    for name in "ab":
        add_coeff_adapter(unet, adapter_name=name)
    set_coeff_adapters(unet, ["a", "b"], [{"attn2": 0.5}, -1.0])
    before = get_active_coeff_adapters(unet)
    with coeff_adapters(unet, "a", 0.3):
        assert get_active_coeff_adapters(unet) == {"a": 0.3}
    with pytest.raises(KeyError), coeff_adapters(unet, "a", 0.3):
        raise KeyError
    assert get_active_coeff_adapters(unet) == before
    with coeff_adapters(unet, "a"):
        delete_coeff_adapters(unet, "b")
    assert get_active_coeff_adapters(unet) == {"a": before["a"]}
    run(unet)


def test_disable_and_enable(unet) -> None:
    base = run(unet)
    add_coeff_adapter(unet)
    randomise(unet)
    mixed = run(unet)
    disable_coeff_adapters(unet)
    torch.testing.assert_close(run(unet), base, rtol=0, atol=0)
    with coeff_disabled(unet):
        pass
    torch.testing.assert_close(run(unet), base, rtol=0, atol=0)
    with pytest.raises(ValueError, match="are disabled, and a new adapter would be too: enable_coeff_adapters"):
        add_coeff_adapter(unet, adapter_name="new")
    enable_coeff_adapters(unet)
    torch.testing.assert_close(run(unet), mixed, rtol=0, atol=0)


def kwargs_name(model: nn.Module) -> str:
    return next(name for name in inspect.signature(model.forward).parameters if name.endswith("attention_kwargs"))


def test_coeff_scale_in_the_attention_kwargs_weighs_one_call(host, model) -> None:
    add_coeff_adapter(model)
    randomise(model)
    set_coeff_adapters(model, "default", 0.8)
    given = {"coeff_scale": 0.5, "scale": 1.0}
    with torch.no_grad():
        whole = host.run(model)
        with coeff_adapters(model, "default", 0.4):
            half = host.run(model)
        with coeff_disabled(model):
            base = host.run(model)

        def scaled(scale):
            given["coeff_scale"] = scale
            return model(**host.inputs(), **{kwargs_name(model): given}, return_dict=False)[0]

        torch.testing.assert_close(scaled(0.5), half, rtol=1e-4, atol=1e-4)  # one rounding of Delta
        assert given["coeff_scale"] == 0.5  # the caller's dict is left as it is
        assert (half - whole).abs().max() > 1e-2
        torch.testing.assert_close(scaled(0), base, rtol=0, atol=0)
        torch.testing.assert_close(host.run(model), whole, rtol=0, atol=0)
        with pytest.raises(ValueError, match="coeff_scale must be a finite number, got nan"):
            scaled(float("nan"))
        torch.testing.assert_close(host.run(model), whole, rtol=0, atol=0)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        out = copied(**host.inputs(), **{kwargs_name(model): {"coeff_scale": 0.5}}, return_dict=False)[0]
    torch.testing.assert_close(out, half, rtol=1e-4, atol=1e-4)


def test_coeff_scale_reaches_layers_to_which_the_host_passes_nothing_on() -> None:
    """As half of diffusers' transformers do, QwenImage, LTX and Wan among them."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    wan = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=16, ffn_dim=16, num_layers=1, rope_max_seq_len=32,
    ).eval()  # fmt: skip
    visible(wan)
    add_coeff_adapter(wan)
    randomise(wan)
    inputs = {"hidden_states": torch.randn(1, 4, 2, 8, 8), "timestep": torch.tensor([3])}
    inputs["encoder_hidden_states"] = torch.randn(1, 5, 8)
    with torch.no_grad():
        whole = wan(**inputs).sample
        half = wan(**inputs, attention_kwargs={"coeff_scale": 0.5}).sample
        assert (half - whole).abs().max() > 1e-2
        with coeff_adapters(wan, "default", 0.5):
            torch.testing.assert_close(wan(**inputs).sample, half, rtol=1e-4, atol=1e-4)  # one rounding of Delta


def test_coeff_scale_serves_processors_set_by_diffusers_own_method(unet) -> None:
    unet.set_attn_processor(CoeffAttnProcessor.for_model(unet))
    randomise(unet)
    with torch.no_grad():
        half = unet(**UNET.inputs(), cross_attention_kwargs={"coeff_scale": 0.5}, return_dict=False)[0]
        base = unet(**UNET.inputs(), cross_attention_kwargs={"coeff_scale": 0.0}, return_dict=False)[0]
    with coeff_adapters(unet, "default", 0.5):
        torch.testing.assert_close(run(unet), half, rtol=1e-4, atol=1e-4)  # one rounding of Delta
    with coeff_disabled(unet):
        torch.testing.assert_close(run(unet), base, rtol=0, atol=0)


def test_coeff_scale_is_kept_for_the_backward_pass_of_gradient_checkpointing(unet) -> None:
    add_coeff_adapter(unet)
    randomise(unet)
    unet.requires_grad_(False).train()
    for parameter in coeff_parameters(unet):
        parameter.requires_grad_(True)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            unet.enable_gradient_checkpointing()
        for parameter in coeff_parameters(unet):
            parameter.grad = None
        given = {"cross_attention_kwargs": {"coeff_scale": 0.5}, "return_dict": False}
        unet(**UNET.inputs(), **given)[0].square().mean().backward()
        grads.append([parameter.grad.clone() for parameter in coeff_parameters(unet)])
    torch.testing.assert_close(*grads, rtol=0, atol=0)  # the same operations are run again


@pytest.mark.slow
def test_coeff_scale_under_compile() -> None:
    """With graph breaks: fullgraph=True raises, as diffusers' reading of signatures meets a dict that was changed."""
    torch.manual_seed(0)
    host = HOSTS["sd3"]
    model = visible(host.build().eval())
    add_coeff_adapter(model)
    randomise(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        for scale in (None, 0.5, 0.25, 0.0, None):
            given = {} if scale is None else {"joint_attention_kwargs": {"coeff_scale": scale}}
            out = compiled(**host.inputs(), **given, return_dict=False)[0]
            with coeff_adapters(model, "default", 1.0 if scale is None else scale):
                torch.testing.assert_close(out, host.run(model), rtol=1e-4, atol=1e-4)  # other sums


def test_unloading_leaves_no_hook(unet) -> None:
    for take_off in (unload_coeff_weights, lambda model: delete_coeff_adapters(model, "default")):
        add_coeff_adapter(unet)
        assert unet._forward_pre_hooks
        take_off(unet)
        assert not unet._forward_pre_hooks
        assert not unet._forward_pre_hooks_with_kwargs
        assert not any(module._forward_pre_hooks or module._state_dict_pre_hooks for module in unet.modules())
