"""The maps of a prompt's word: exact, of the right tokens, of the right half of the batch, in bounded memory."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from diffusers import FluxKontextPipeline
from hosts import randomise
from PIL import Image
from tiny_sd import tiny_pipeline
from torch import Tensor
from torch.overrides import TorchFunctionMode

from coeff_diffusers import (
    CoeffConfig,
    add_coeff_adapter,
    attention_maps,
    coeff_disabled,
    coeff_state_dict,
    maps,
    mixed_attention,
    overlay_map,
    save_coeff_weights,
    unload_coeff_weights,
)
from coeff_diffusers.cli import main
from coeff_diffusers.words import token_positions

PROMPT = "a red fox"
CROSS = "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn2"
FIRST = {  # the first layer with the text, its text's first key, and where the image's rows are
    "StableDiffusion3Pipeline": ("transformer.transformer_blocks.0.attn", "end"),
    "FluxPipeline": ("transformer.transformer_blocks.0.attn", "begin"),
}


@cache
def built(name: str) -> Any:
    pipe = tiny_pipeline() if name == "StableDiffusionPipeline" else tiny_models.tiny_pipeline(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def sd() -> Any:
    """With random coefficients."""
    pipe = built("StableDiffusionPipeline")
    add_coeff_adapter(pipe)
    randomise(pipe)
    yield pipe
    unload_coeff_weights(pipe)


def settings(pipe: Any, **changes: Any) -> dict[str, Any]:
    side = {"height": 16, "width": 16} if type(pipe).__name__ == "StableDiffusionPipeline" else {}
    own = tiny_models.call_settings(type(pipe).__name__) | side | {"output_type": "pil"}
    return own | {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 1} | changes


class Calls(TorchFunctionMode):
    """Queries, keys and values of every call for attention."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Tensor, Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value")
            given = dict(zip(names, args)) | (kwargs or {})
            self.found.append(tuple(given[name] for name in names))
        return func(*args, **(kwargs or {}))


def test_maps_times_the_values_are_what_the_layer_computes(sd) -> None:
    layer = sd.unet.get_submodule(CROSS.removeprefix("unet."))
    seen: dict[str, Tensor] = {}
    handles = [
        layer.to_v.register_forward_hook(lambda _, args, output: seen.update(values=output[-1])),
        layer.to_out[0].register_forward_pre_hook(lambda _, args: seen.update(output=args[0][-1])),
    ]
    count = sd.tokenizer.model_max_length
    found = [attention_maps(sd, PROMPT, [place], layers=CROSS, **settings(sd)) for place in range(count)]
    for handle in handles:
        handle.remove()
    heads = layer.heads
    after = torch.stack([one.after[CROSS] for one in found], -1).flatten(1, 2)  # (H, T, S)
    before = torch.stack([one.before[CROSS] for one in found], -1).flatten(1, 2)
    values, output = (seen[name].unflatten(-1, (heads, -1)).transpose(0, 1) for name in ("values", "output"))
    torch.testing.assert_close(after @ values, output)
    torch.testing.assert_close(before.sum(-1), torch.ones(before.shape[:2]))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(before @ values, output)


def test_blocks_of_rows_and_masks_are_exact(monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, n, 4, generator=generator) for n in (5, 7, 7))
    delta, mask = torch.randn(3, 3, generator=generator), torch.randn(1, 5, 7, generator=generator)
    monkeypatch.setattr(maps, "_ENTRIES", 2 * 3 * 7)  # two rows at a time
    blocks = list(maps.maps_of_keys(q, k, range(7), mask, False, 0.3))
    assert [block.shape[1] for block in blocks] == [2, 2, 1]
    before = torch.cat(blocks, 1)
    after = before + torch.einsum("ij, jts -> its", delta, before)
    expected = mixed_attention(q[None], k[None], v[None], delta, attn_mask=mask[None], scale=0.3)[0]
    torch.testing.assert_close(after @ v, expected)
    causal = torch.cat(list(maps.maps_of_keys(q, k, range(7), None, True, 0.3)), 1)
    torch.testing.assert_close(causal @ v, F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3))


@pytest.mark.parametrize("name", FIRST)
def test_joint_attention_finds_the_words_keys_and_the_images_rows(name: str) -> None:
    pipe, (path, place) = built(name), FIRST[name]
    layer = pipe.transformer.get_submodule(path.removeprefix("transformer."))
    seen: dict[str, Tensor] = {}
    norm = getattr(layer, "norm_added_k", None) or torch.nn.Identity()

    def keep(_: Any, args: Any, output: Tensor) -> None:
        seen.setdefault("text", norm(output.unflatten(-1, (layer.heads, -1))).transpose(1, 2))

    handle = layer.add_k_proj.register_forward_hook(keep)
    with Calls() as calls:
        pipe(PROMPT, **settings(pipe))
    handle.remove()
    text = seen["text"][-1]
    length = text.shape[1]
    query, key, _ = next([x[-1] for x in call] for call in calls.found if call[1].shape[2] > length)
    texts = slice(-length, None) if place == "end" else slice(length)
    torch.testing.assert_close(key[:, texts], text)  # the text's keys are there
    images = slice(-length) if place == "end" else slice(length, None)
    weights = torch.softmax(query @ key.transpose(1, 2) * query.shape[-1] ** -0.5, -1)[:, images, texts]

    add_coeff_adapter(pipe, CoeffConfig(include=path.partition(".")[2]))
    randomise(pipe)
    found = attention_maps(pipe, PROMPT, "fox", **settings(pipe))
    (delta,) = coeff_state_dict(pipe).values()
    unload_coeff_weights(pipe)
    before = weights[..., list(found.positions)].sum(-1)
    torch.testing.assert_close(found.before[path].flatten(1), before)
    torch.testing.assert_close(found.after[path].flatten(1), before + delta @ before)
    assert found.most_changed()[0] == path
    others = set(found.before) - {path}
    assert others
    for other in others:
        torch.testing.assert_close(found.before[other], found.after[other], rtol=0, atol=0)  # no coefficients there
        assert found.before[other].shape == found.before[path].shape
        assert found.before[other].max() < 1.0001


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "PixArtSigmaPipeline"])
def test_cross_attention_of_other_pipelines(name: str) -> None:
    pipe = built(name)
    found = attention_maps(pipe, PROMPT, "red fox", **settings(pipe, height=32, width=64))
    assert found.image.size == (64, 32)
    assert found.before
    for path, before in found.before.items():
        assert before.shape[2] == 2 * before.shape[1], path
        assert 0 < before.max() < 1.0001


def test_the_mean_is_over_the_steps_asked_for(sd) -> None:
    def over(steps: list[int]) -> Any:
        return attention_maps(sd, PROMPT, "fox", layers=CROSS, steps=steps, **settings(sd, num_inference_steps=3))

    each, both = [over([step]) for step in range(3)], over([0, 2])
    assert both.steps == (0, 2)
    for path, after in both.after.items():
        mean = (each[0].after[path] + each[2].after[path]) / 2
        torch.testing.assert_close(after, mean)
    with pytest.raises(ValueError, match=r"the call has the denoising steps 0 to 2, and not \[5\]"):
        over([0, 5])


def test_guidances_other_half_does_not_count_and_nothing_stays_behind(sd) -> None:
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in sd.unet.modules()]
    alone = attention_maps(sd, PROMPT, "fox", **settings(sd, guidance_scale=1.0))
    guided = attention_maps(sd, PROMPT, "fox", **settings(sd, guidance_scale=7.5, negative_prompt="a hat"))
    torch.testing.assert_close(guided.after, alone.after, atol=1e-4, rtol=0)  # a batch of two rounds otherwise
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in sd.unet.modules()] == hooks
    expected = sd(PROMPT, **settings(sd, guidance_scale=1.0)).images[0]
    assert alone.image.tobytes() == expected.tobytes()


def test_without_coefficients_both_are_the_same(sd) -> None:
    with coeff_disabled(sd):
        found = attention_maps(sd, PROMPT, "fox", layers="up_blocks.*", **settings(sd))
    assert list(found.before) == [path for path in found.before if ".up_blocks." in path]
    torch.testing.assert_close(found.after, found.before, rtol=0, atol=0)  # the base model


@pytest.mark.parametrize(
    ("name", "word", "tokens"),
    [
        ("StableDiffusionPipeline", "red", ["r", "e", "d</w>"]),
        ("StableDiffusionXLPipeline", "red fox", ["r", "e", "d</w>", "f", "o", "x</w>"]),
        ("StableDiffusionPipeline", "a", ["a</w>"]),
    ],
)
def test_positions_are_those_of_the_words_tokens(name: str, word: str, tokens: list[str]) -> None:
    pipe = built(name)
    ids = pipe.tokenizer(PROMPT).input_ids
    positions = token_positions(pipe, PROMPT, word)
    assert pipe.tokenizer.convert_ids_to_tokens([ids[place] for place in positions]) == tokens


def test_positions_of_t5_stand_behind_those_of_clip() -> None:
    pipe = built("StableDiffusion3Pipeline")
    positions = token_positions(pipe, PROMPT, "fox")
    clip = token_positions(built("StableDiffusionXLPipeline"), PROMPT, "fox")
    length = pipe.tokenizer.model_max_length
    assert positions[: len(clip)] == clip
    assert all(place >= length for place in positions[len(clip) :])
    ids = pipe.tokenizer_3(PROMPT).input_ids
    rest = [ids[place - length] for place in positions[len(clip) :]]
    assert pipe.tokenizer_3.decode(rest).strip() == "fox"
    assert token_positions(built("FluxPipeline"), PROMPT, "fox")


def test_words_that_cannot_be_had_are_named(sd) -> None:
    with pytest.raises(ValueError, match="the prompt 'a red fox' has no 'ox'"):
        attention_maps(sd, PROMPT, "ox", **settings(sd))
    with pytest.raises(ValueError, match="the tokens of 'fox' are cut off"):
        attention_maps(sd, "a very very very very red fox", "fox", **settings(sd))
    with pytest.raises(ValueError, match="how ZImagePipeline lays out its text is not known here; give the positions"):
        attention_maps(built("ZImagePipeline"), PROMPT, "fox")
    with pytest.raises(ValueError, match=r"positions must be below 16, the text's tokens, got \[3, 16\]"):
        attention_maps(sd, PROMPT, [3, 16], **settings(sd))


def test_what_cannot_be_recorded_is_named(sd) -> None:
    with pytest.raises(ValueError, match="of one prompt and one image: call once for each"):
        attention_maps(sd, [PROMPT, PROMPT], "fox")
    for changes in ({"output_type": "latent"}, {"return_dict": False}):
        with pytest.raises(ValueError, match="are of an image: leave output_type and return_dict out"):
            attention_maps(sd, PROMPT, "fox", **changes)
    with pytest.raises(ValueError, match="steps must name a denoising step, got none"):
        attention_maps(sd, PROMPT, "fox", steps=[])
    for word in ([], [-1], 5, None, [1.5]):
        with pytest.raises(ValueError, match=r"must be of the prompt, or a list of positions from 0 on, got"):
            attention_maps(sd, PROMPT, word)
    with pytest.raises(ValueError, match=r"no layer that sees the text matches \('attn1',\)"):
        attention_maps(sd, PROMPT, "fox", layers="attn1")
    with pytest.raises(ValueError, match=r"where text and image stand in the sequence of \['ZSingleStream"):
        attention_maps(built("ZImagePipeline"), PROMPT, [1])


def test_tokens_of_reference_images_are_refused() -> None:
    pipe = FluxKontextPipeline.from_pipe(built("FluxPipeline"), image_encoder=None, feature_extractor=None)
    image = Image.new("RGB", (32, 32), "red")
    with pytest.raises(ValueError, match="tokens are no image of .*: call without reference images"):
        attention_maps(pipe, PROMPT, "fox", image=image, _auto_resize=False, max_area=32 * 32, **settings(pipe))


def test_a_map_is_drawn_over_the_image() -> None:
    image = Image.new("RGB", (8, 4), (200, 200, 200))
    weights = torch.zeros(2, 4)
    weights[0, 0], weights[1, 3] = 1.0, -1.0
    drawn = overlay_map(image, weights)
    assert drawn.size == (8, 4)
    red, blue = drawn.getpixel((0, 0)), drawn.getpixel((7, 3))
    assert red[0] > 200 > 100 > red[2]
    assert blue[2] > 200 > 100 > blue[0]
    faint = overlay_map(image, weights, limit=10.0).getpixel((0, 0))
    assert abs(faint[0] - faint[2]) < 30
    assert len(set(overlay_map(image, torch.zeros(2, 4)).getdata())) == 1


def test_the_command_draws_the_layers_that_change_most(sd, tmp_path, capsys) -> None:
    sd.save_pretrained(tmp_path / "model")
    save_coeff_weights(sd, tmp_path / "fox")
    flags = ["--pretrained_model_name_or_path", str(tmp_path / "model"), "--coeff_weights", str(tmp_path / "fox")]
    flags += ["--prompt", PROMPT, "--num_inference_steps", "1", "--output_file", str(tmp_path / "maps" / "fox.png")]
    assert main(["maps", *flags, "--word", "fox", "--top", "2", "--layers", "attn2"]) == 0
    with Image.open(tmp_path / "maps" / "fox.png") as drawn:
        assert drawn.height > 5 * 96  # the image, and two layers before and after
    assert main(["maps", *flags, "--word", "hat"]) == 1
    assert "error: the prompt 'a red fox' has no 'hat'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output_file", "maps.txt"], "--output_file: its name must end in .png or .jpg, got maps.txt"),
        (["--height", "64"], "--height and --width: give both, or none"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_a_model_is_loaded(flags: list[str], message: str, capsys) -> None:
    needed = ["--pretrained_model_name_or_path", "none", "--coeff_weights", "none", "--prompt", "fox", "--word", "fox"]
    with pytest.raises(SystemExit) as ended:
        main(["maps", *needed, *flags])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_what_the_page_shows_runs(sd, tmp_path, monkeypatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "attention_maps.md").read_text(encoding="utf-8")
    set_timesteps = sd.scheduler.set_timesteps
    monkeypatch.setattr(sd.scheduler, "set_timesteps", lambda steps, **options: set_timesteps(2, **options))
    monkeypatch.chdir(tmp_path)
    names = {"pipe": sd}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "attention_maps.md", "exec"), names)
    assert (tmp_path / "head-0.png").exists()
