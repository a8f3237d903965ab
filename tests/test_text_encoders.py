"""Coefficients on the text encoders of a pipeline: off by default, in the same file, under the same contract."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from diffusers import DiffusionPipeline
from hosts import HOSTS, randomise, visible
from safetensors import safe_open
from torch import nn
from transformers import (
    BloomConfig,
    BloomModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2Config,
    Qwen2Model,
    T5Config,
    T5EncoderModel,
)

from coeff_diffusers import (
    CoeffConfig,
    add_coeff_adapter,
    check_coeff_adapters,
    coeff_disabled,
    coeff_parameters,
    coeff_per_sample,
    delete_coeff_adapters,
    list_coeff_adapters,
    load_coeff_weights,
    read_coeff_metadata,
    save_coeff_weights,
    set_coeff_adapters,
    unload_coeff_weights,
)
from coeff_diffusers.text import text_attention_layers

CLIP = CLIPTextConfig(
    vocab_size=11, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=7, projection_dim=8, bos_token_id=0, eos_token_id=1, pad_token_id=2,
)  # fmt: skip
T5 = T5Config(vocab_size=11, d_model=16, d_kv=4, d_ff=8, num_layers=2, num_heads=3)
QWEN = Qwen2Config(
    vocab_size=11, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=2,
)  # fmt: skip
ENCODERS = {
    "clip": (CLIPTextModel, CLIP, 4),
    "clip with projection": (CLIPTextModelWithProjection, CLIP, 4),
    "t5": (T5EncoderModel, T5, 3),
    "qwen2": (Qwen2Model, QWEN, 4),
}


@pytest.fixture(params=ENCODERS)
def heads(request) -> int:
    return ENCODERS[request.param][2]


@pytest.fixture
def encoder(request, heads) -> nn.Module:
    cls, config, _ = ENCODERS[request.node.callspec.params["heads"]]
    return build(cls, config)


def build(cls, config) -> nn.Module:
    torch.manual_seed(0)
    model = visible(cls(copy.deepcopy(config)).eval().requires_grad_(False))
    if not text_attention_layers(model):  # T5 in older releases
        with pytest.raises(ValueError, match=f"{cls.__name__} does not take its attention through transformers'"):
            add_coeff_adapter(model)
        pytest.skip(f"{cls.__name__} does not take its attention through AttentionInterface in this transformers")
    return model


def encode(encoder: nn.Module) -> torch.Tensor:
    ids = torch.tensor([[3, 4, 5, 6, 1, 2], [7, 8, 1, 2, 2, 2]])
    out = encoder(input_ids=ids, attention_mask=(ids != 2).long())
    return out[0] if out[0].ndim == 3 else out.last_hidden_state


@torch.no_grad()
def run(encoder: nn.Module) -> torch.Tensor:
    return encode(encoder)


def test_contract(encoder, heads, tmp_path) -> None:
    base, keys, implementation = run(encoder), list(encoder.state_dict()), encoder.config._attn_implementation
    names = [name for name, _ in encoder.named_modules()]
    fresh = copy.deepcopy(encoder)
    add_coeff_adapter(encoder)
    assert [tuple(p.shape) for p in coeff_parameters(encoder)] == [(heads, heads)] * 2
    torch.testing.assert_close(run(encoder), base, rtol=1e-4, atol=1e-4)  # another order of sums
    randomise(encoder)
    out = encode(encoder)
    assert (out - base).norm() > 1e-2 * base.norm()
    out.square().mean().backward()
    for parameter in coeff_parameters(encoder):
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.ne(0).all()
    with coeff_disabled(encoder):
        torch.testing.assert_close(run(encoder), base, rtol=0, atol=0)
    save_coeff_weights(encoder, tmp_path)
    load_coeff_weights(fresh, tmp_path)
    torch.testing.assert_close(run(fresh), out.detach(), rtol=0, atol=0)
    assert list(encoder.state_dict()) == keys
    unload_coeff_weights(encoder)
    assert [name for name, _ in encoder.named_modules()] == names
    assert encoder.config._attn_implementation == implementation
    torch.testing.assert_close(run(encoder), base, rtol=0, atol=0)


def test_copies_and_pickles(encoder) -> None:
    add_coeff_adapter(encoder)
    randomise(encoder)
    for twin in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        torch.testing.assert_close(run(twin), run(encoder), rtol=0, atol=0)
        unload_coeff_weights(twin)
    assert list_coeff_adapters(encoder) == ["default"]


def test_save_pretrained_writes_the_base_model(encoder, tmp_path) -> None:
    base = run(encoder)
    add_coeff_adapter(encoder)
    randomise(encoder)
    encoder.save_pretrained(tmp_path)
    reloaded, info = type(encoder).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(run(reloaded.eval()), base, rtol=0, atol=0)


def test_another_attention_function_is_refused_before_and_after() -> None:
    clip = build(CLIPTextModel, CLIP)
    clip.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"CLIPTextModel uses the attention 'eager'; call .*\('sdpa'\) first"):
        add_coeff_adapter(clip)
    assert list_coeff_adapters(clip) == []
    clip.set_attn_implementation("sdpa")
    add_coeff_adapter(clip)
    clip.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match="set to 'eager', where coefficients take no part"):
        run(clip)
    assert any("uses the attention 'eager'" in line for line in check_coeff_adapters(clip))
    clip.set_attn_implementation("coeff_sdpa")
    run(clip)


def test_a_model_without_the_interface_is_refused_by_name() -> None:
    bloom = BloomModel(BloomConfig(vocab_size=11, hidden_size=8, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="BloomModel does not take its attention through transformers'"):
        add_coeff_adapter(bloom)


class TextPipeline(DiffusionPipeline):
    def __init__(self, unet, text_encoder, text_encoder_2):
        super().__init__()
        self.register_modules(unet=unet, text_encoder=text_encoder, text_encoder_2=text_encoder_2)


@pytest.fixture
def pipe(unet) -> TextPipeline:
    return TextPipeline(unet, build(CLIPTextModel, CLIP), build(T5EncoderModel, T5))


def test_text_encoders_are_left_alone_by_default(pipe) -> None:
    add_coeff_adapter(pipe)
    assert list_coeff_adapters(pipe.unet) == ["default"]
    assert list_coeff_adapters(pipe.text_encoder) == []
    assert pipe.text_encoder.config._attn_implementation == "sdpa"
    assert check_coeff_adapters(pipe)[0] == "ok: 8 of 8 attention layers have coefficients"  # none is expected there


def test_all_components_go_into_one_file(pipe, tmp_path) -> None:
    twin = TextPipeline(*(copy.deepcopy(part) for part in pipe.components.values()))
    add_coeff_adapter(pipe, components=("unet", "text_encoder", "text_encoder_2"))
    randomise(pipe)
    path = save_coeff_weights(pipe, tmp_path)
    with safe_open(path, framework="pt") as file:
        prefixes = [key.partition(".")[0] for key in file.keys()]  # noqa: SIM118 (no mapping)
    assert {name: prefixes.count(name) for name in prefixes} == {"unet": 8, "text_encoder": 2, "text_encoder_2": 2}
    load_coeff_weights(twin, path)
    for name in ("text_encoder", "text_encoder_2"):
        torch.testing.assert_close(run(getattr(twin, name)), run(getattr(pipe, name)), rtol=0, atol=0)
    torch.testing.assert_close(HOSTS["unet"].run(twin.unet), HOSTS["unet"].run(pipe.unet), rtol=0, atol=0)
    assert check_coeff_adapters(twin)[0] == "ok: 12 of 12 attention layers have coefficients"
    set_coeff_adapters(twin, "default", 0.0)
    torch.testing.assert_close(run(twin.text_encoder), build_and_run_clip(), rtol=0, atol=0)
    delete_coeff_adapters(twin, "default")
    assert twin.text_encoder.config._attn_implementation == "sdpa"


def build_and_run_clip() -> torch.Tensor:
    return run(build(CLIPTextModel, CLIP))


def test_a_file_for_several_components_has_the_denoisers_config(pipe, tmp_path) -> None:
    pipe = StableDiffusionOrder(pipe.text_encoder, pipe.unet)
    add_coeff_adapter(pipe.text_encoder, CoeffConfig(include="layers.0.*"))
    add_coeff_adapter(pipe.unet, CoeffConfig(kinds=("cross",)))
    config = read_coeff_metadata(save_coeff_weights(pipe, tmp_path))["coeff_diffusers"]["config"]
    assert (config["include"], config["kinds"]) == (None, ["cross"])


class StableDiffusionOrder(DiffusionPipeline):
    """The text encoder first, as in most pipelines."""

    def __init__(self, text_encoder, unet):
        super().__init__()
        self.register_modules(text_encoder=text_encoder, unet=unet)


def test_a_text_encoder_alone(pipe) -> None:
    add_coeff_adapter(pipe, components="text_encoder")
    assert len(coeff_parameters(pipe)) == 2
    add_coeff_adapter(pipe, adapter_name="image")
    assert len(coeff_parameters(pipe)) == 10
    unload_coeff_weights(pipe)
    assert list_coeff_adapters(pipe) == []


def test_a_file_for_other_components_is_refused(pipe, tmp_path) -> None:
    add_coeff_adapter(pipe, components="text_encoder_2")
    save_coeff_weights(pipe, tmp_path)
    unload_coeff_weights(pipe)
    pipe.text_encoder_2 = None
    with pytest.raises(ValueError, match=r"text_encoder_2: the file is for a model with this component"):
        load_coeff_weights(pipe, tmp_path)


def test_an_unknown_component_is_named(pipe) -> None:
    with pytest.raises(ValueError, match=r"some of \['text_encoder', 'text_encoder_2', 'unet'\], got \['vae'\]"):
        add_coeff_adapter(pipe, components="vae")
    assert list_coeff_adapters(pipe) == []


def test_an_adapter_that_a_text_encoder_has_cannot_be_one_of_a_image_s(pipe) -> None:
    add_coeff_adapter(pipe, components=("unet", "text_encoder"))
    with (
        pytest.raises(ValueError, match=r"adapters \['default'\] are on text_encoder, too, where images cannot be"),
        coeff_per_sample(pipe, ["default", None]),
    ):
        pass
    run(pipe.text_encoder)
