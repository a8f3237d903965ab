"""One adapter per image is each image alone, in pipelines, models, training and compiled; and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNetMotionModel, WanTransformer3DModel
from hosts import HOSTS, randomise, visible
from tiny_sd import tiny_pipeline

from coeff_diffusers import (
    CoeffConfig,
    add_coeff_adapter,
    coeff_adapters,
    coeff_disabled,
    coeff_parameters,
    coeff_per_sample,
    disable_coeff_adapters,
    get_active_coeff_adapters,
    load_coeff_weights,
    save_coeff_weights,
    set_coeff_adapters,
)

MODEL = Path(__file__).parents[1] / "examples" / "emoji" / "model"
PROMPTS = ["a sks dog", "a dog", "a sks cat"]
NAMES = ["dog", None, "cat"]


def with_adapters(model, names=("dog", "cat"), scale=0.5):
    for seed, name in enumerate(names):
        add_coeff_adapter(model, adapter_name=name)
        randomise(model, name, seed, scale)
    return model


@pytest.fixture
def pipe():
    pipe = with_adapters(tiny_pipeline())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generated(pipe, prompts, seeds, **options):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(prompts, generator=generators, num_inference_steps=2, output_type="np", **options).images


def alone(pipe, prompts, names, seeds, **options):
    """Each image by a call of its own, with its adapter or none."""
    images = []
    for prompt, name, seed in zip(prompts, names, seeds, strict=True):
        with coeff_disabled(pipe) if name is None else coeff_adapters(pipe, name):
            images.append(generated(pipe, [prompt], [seed], **options)[0])
    return images


def same(one, other):
    torch.testing.assert_close(
        torch.as_tensor(one), torch.as_tensor(other), rtol=1e-4, atol=1e-4
    )  # float32, other batches


@pytest.mark.parametrize("guidance", [1.0, 3.0], ids=["unguided", "guided"])
def test_each_image_is_what_it_is_alone(pipe, guidance) -> None:
    together = alone(pipe, PROMPTS, NAMES, [3, 3, 3], guidance_scale=guidance)
    with coeff_per_sample(pipe, NAMES):
        images = generated(pipe, PROMPTS, [3, 3, 3], guidance_scale=guidance)
    for one, other in zip(images, together, strict=True):
        same(one, other)
    with coeff_per_sample(pipe, NAMES[::-1]):
        turned = generated(pipe, PROMPTS, [3, 3, 3], guidance_scale=guidance)
    same(turned[1], images[1])
    assert abs(turned[0] - images[0]).max() > 1e-2
    assert abs(turned[2] - images[2]).max() > 1e-2


@pytest.mark.parametrize("guidance", [1.0, 3.0], ids=["unguided", "guided"])
def test_names_of_prompts_serve_all_their_images(pipe, guidance) -> None:
    seeds = [0, 1, 0, 1, 0, 1]  # the same latents again and again
    expected = alone(
        pipe, [p for p in PROMPTS for _ in "12"], [n for n in NAMES for _ in "12"], seeds, guidance_scale=guidance
    )
    with coeff_per_sample(pipe, NAMES):
        images = generated(pipe, PROMPTS, seeds, num_images_per_prompt=2, guidance_scale=guidance)
    for one, other in zip(images, expected, strict=True):
        same(one, other)


@pytest.mark.parametrize("guidance", [1.0, 3.0], ids=["unguided", "guided"])
def test_one_prompt_and_a_name_for_each_of_its_images(pipe, guidance) -> None:
    expected = alone(pipe, ["a dog"] * 4, ["dog", "cat", None, "dog"], [5, 5, 5, 6], guidance_scale=guidance)
    with coeff_per_sample(pipe, ["dog", "cat", None, "dog"]):
        images = generated(pipe, "a dog", [5, 5, 5, 6], num_images_per_prompt=4, guidance_scale=guidance)
    for one, other in zip(images, expected, strict=True):
        same(one, other)


def test_weights_are_the_images_own_and_coeff_scale_is_all_s(pipe) -> None:
    with coeff_adapters(pipe, "dog", 0.35):
        expected = generated(pipe, ["a dog"], [1])
    with coeff_per_sample(pipe, ["cat", "dog"], [1.0, 0.7]):
        images = generated(pipe, ["a cat", "a dog"], [1, 1], cross_attention_kwargs={"coeff_scale": 0.5})
    same(images[1], expected[0])


@pytest.mark.parametrize("names", [["dog"], ["dog", "cat"], ["dog", "cat", None, "dog"]], ids=len)
def test_a_wrong_number_of_names_is_refused_before_anything_is_computed(pipe, names) -> None:
    def forward(*args, **kwargs):
        raise AssertionError("something was computed")

    pipe.text_encoder.forward = pipe.unet.forward = pipe.vae.forward = forward
    with (
        coeff_per_sample(pipe, names),
        pytest.raises(ValueError, match=f"named for {len(names)} images, the call has 3 p"),
    ):
        generated(pipe, PROMPTS, [0, 1, 2])
    with coeff_per_sample(pipe, names), pytest.raises(ValueError, match="has 3 prompts, 2 images each"):
        generated(pipe, PROMPTS, [0] * 6, num_images_per_prompt=2)


def test_embeddings_do_not_tell_prompts_from_images(pipe) -> None:
    with torch.no_grad():
        embeds, negative = pipe.encode_prompt(["a dog", "a cat"], "cpu", 1, True)
    given = {"prompt": None, "prompt_embeds": embeds, "negative_prompt_embeds": negative, "output_type": "np"}
    with coeff_per_sample(pipe, ["dog", "cat"]):
        images = pipe(
            **given, num_inference_steps=1, generator=[torch.Generator().manual_seed(0) for _ in "12"]
        ).images
        with pytest.raises(ValueError, match="give the prompts as text, or repeat prompt_embeds"):
            pipe(**given, num_inference_steps=1, num_images_per_prompt=2)
    with coeff_adapters(pipe, "cat"):
        expected = pipe("a cat", num_inference_steps=1, output_type="np", generator=torch.Generator().manual_seed(0))
    same(images[1], expected.images[0])


def test_every_host_mixes_per_sample(host, model) -> None:
    with_adapters(model)
    with torch.no_grad():
        with coeff_adapters(model, "dog"):
            dog = host.run(model)
        with coeff_adapters(model, "cat", -0.5):
            cat = host.run(model)
        with coeff_per_sample(model, ["dog", "cat"], [1, -0.5]):
            both = host.run(model)
    same(both[0], dog[0])
    same(both[1], cat[1])
    assert (both[0] - cat[0]).abs().max() > 1e-2


def test_frames_folded_into_the_batch_follow_their_sample() -> None:
    torch.manual_seed(0)
    video = visible(
        UNetMotionModel(
            sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"), motion_num_attention_heads=2,
            up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), num_attention_heads=2,
        ).eval()
    )  # fmt: skip
    with_adapters(video)
    sample, text = torch.randn(2, 4, 3, 8, 8), torch.randn(6, 5, 8)

    @torch.no_grad()
    def run():
        return video(sample, 7, text, return_dict=False)[0]

    with coeff_adapters(video, "dog"):
        dog = run()
    with coeff_adapters(video, "cat"):
        cat = run()
    with coeff_per_sample(video, ["dog", "cat"]):
        both = run()
    same(both[0], dog[0])
    same(both[1], cat[1])


def test_layers_without_the_adapter_are_the_base(unet) -> None:
    add_coeff_adapter(unet, CoeffConfig(kinds=("self",)), adapter_name="dog")
    randomise(unet, "dog")
    add_coeff_adapter(unet, CoeffConfig(kinds=("cross",)), adapter_name="cat")
    randomise(unet, "cat")
    host = HOSTS["unet"]
    with torch.no_grad():
        with coeff_adapters(unet, "dog"):
            dog = host.run(unet)
        with coeff_per_sample(unet, ["dog", "cat"]):
            same(host.run(unet)[0], dog[0])


def test_afterwards_all_is_as_before_also_after_an_error(pipe) -> None:
    set_coeff_adapters(pipe, "dog", 0.3)
    before = generated(pipe, ["a dog"], [0])
    hooks = [len(part._forward_pre_hooks) for part in (pipe.unet, pipe.vae, pipe.text_encoder)]
    with pytest.raises(KeyError), coeff_per_sample(pipe, ["cat"]):
        raise KeyError
    with coeff_per_sample(pipe, ["cat"]):
        generated(pipe, ["a dog"], [0])
        with pytest.raises(ValueError, match="is in use on this model: leave it"), coeff_per_sample(pipe, ["dog"]):
            pass
        inner = generated(pipe, ["a dog"], [0])
    assert get_active_coeff_adapters(pipe) == {"dog": 0.3}
    assert [len(part._forward_pre_hooks) for part in (pipe.unet, pipe.vae, pipe.text_encoder)] == hooks
    same(generated(pipe, ["a dog"], [0]), before)
    with coeff_adapters(pipe, "cat"):
        same(generated(pipe, ["a dog"], [0]), inner)


def forget_gradients(model):
    for parameter in coeff_parameters(model):
        parameter.grad = None


def test_several_adapters_learn_in_one_batch_as_alone(unet) -> None:
    with_adapters(unet)
    host = HOSTS["unet"]
    target = torch.randn(2, 4, 8, 8)
    expected = {}
    for n, name in enumerate(("dog", "cat")):
        forget_gradients(unet)
        with coeff_adapters(unet, name):
            (host.run(unet)[n] - target[n]).square().sum().backward()
        expected[name] = [parameter.grad.clone() for parameter in coeff_parameters(unet, name)]
    forget_gradients(unet)
    with coeff_per_sample(unet, ["dog", "cat"]):
        for _ in range(2):  # the second step of a loop sees parameters that have moved, and a graph of its own
            forget_gradients(unet)
            (host.run(unet) - target).square().sum().backward()
    for name, grads in expected.items():
        found = [parameter.grad for parameter in coeff_parameters(unet, name)]
        torch.testing.assert_close(
            found, grads, rtol=1e-3, atol=1e-3
        )  # other sums; the gradients are of order 1 to 100


def test_dropout_takes_from_each_adapter_what_it_would_take_from_it_alone(unet) -> None:
    for seed, name in enumerate(("dog", "cat")):
        add_coeff_adapter(unet, CoeffConfig(dropout=0.5), adapter_name=name)
        randomise(unet, name, seed)
    runs = {}
    with torch.no_grad():
        for name in ("dog", "cat"):
            with coeff_adapters(unet, name):
                runs[name] = dropped_run(unet)
        with coeff_per_sample(unet, ["dog", "cat"]):
            together = dropped_run(unet)
            whole = HOSTS["unet"].run(unet.eval())
    same(together[0], runs["dog"][0])
    same(together[1], runs["cat"][1])
    assert (together - whole).abs().max() > 1e-2


def dropped_run(unet):
    torch.manual_seed(0)
    return HOSTS["unet"].run(unet.train())


def test_values_that_change_within_are_seen(unet, tmp_path) -> None:
    with_adapters(unet)
    file = save_coeff_weights(unet, tmp_path, adapter_name="cat")
    with torch.no_grad(), coeff_per_sample(unet, ["dog", "cat"]):
        before = HOSTS["unet"].run(unet)
        load_coeff_weights(unet, file, adapter_name="dog", hotswap=True)
        after = HOSTS["unet"].run(unet)
    assert (after[0] - before[0]).abs().max() > 1e-2
    same(after[1], before[1])


@pytest.mark.slow
@pytest.mark.parametrize("way", ["compile", "in place", "blocks"])
def test_other_names_compile_nothing_again(way) -> None:
    torch.manual_seed(0)
    host = HOSTS["flux" if way == "blocks" else "sd3"]
    model = with_adapters(visible(host.build().eval()))
    plain = copy.deepcopy(model)
    torch._dynamo.reset()
    called = model
    if way == "compile":
        called = torch.compile(model, backend="aot_eager", fullgraph=True)
    elif way == "in place":
        model.compile(backend="aot_eager")
    else:
        model.compile_repeated_blocks(backend="aot_eager")
    with torch.no_grad():
        with coeff_per_sample(called, ["dog", None]):
            host.run(called)
        for names in (["cat", "dog"], [None, "cat"], ["cat", "cat"]):
            with coeff_per_sample(called, names), torch._dynamo.config.patch(error_on_recompile=True):
                compiled = host.run(called)
            with coeff_per_sample(plain, names):
                torch.testing.assert_close(compiled, host.run(plain), rtol=1e-4, atol=1e-4)


def test_layers_that_run_without_the_given_object_s_call_are_refused(unet) -> None:
    with_adapters(unet)
    with (
        coeff_per_sample(unet, ["dog", "cat"]),
        pytest.raises(RuntimeError, match="layers ran, but not by a call of the model: call the model, and n"),
    ):
        unet.forward(**HOSTS["unet"].inputs())


def test_a_video_transformer_is_served() -> None:
    torch.manual_seed(0)
    wan = visible(
        WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
            text_dim=8, freq_dim=16, ffn_dim=16, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        ).eval()
    )  # fmt: skip
    with_adapters(wan)
    inputs = {"hidden_states": torch.randn(2, 4, 2, 8, 8), "timestep": torch.tensor([3, 3])}
    inputs["encoder_hidden_states"] = torch.randn(2, 5, 8)

    @torch.no_grad()
    def run():
        return wan(**inputs, return_dict=False)[0]

    with coeff_adapters(wan, "dog"):
        dog = run()
    with coeff_per_sample(wan, ["dog", "cat"]):
        both = run()
    same(both[0], dog[0])
    assert (both[1] - dog[1]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda unet: coeff_per_sample(unet, ["dog", "bird"]), ValueError, r"no adapter \['bird'\]; it has"),
        (lambda unet: coeff_per_sample(unet, "dog"), TypeError, "must be a list .* got 'dog'"),
        (lambda unet: coeff_per_sample(unet, []), ValueError, "at least one"),
        (lambda unet: coeff_per_sample(unet, ["dog"], [1.0, 2.0]), ValueError, "1 names need as many finite weights"),
        (lambda unet: coeff_per_sample(unet, ["dog"], float("inf")), ValueError, "finite"),
    ],
)
def test_what_is_refused_says_why(unet, call, error, message) -> None:
    with_adapters(unet)
    with pytest.raises(error, match=message), call(unet):
        raise AssertionError("went in")
    assert get_active_coeff_adapters(unet) == {"cat": 1.0}


def test_names_that_do_not_fit_a_bare_model_s_batch(unet) -> None:
    with_adapters(unet)
    with (
        coeff_per_sample(unet, ["dog", "cat", None]),
        pytest.raises(ValueError, match="a batch of 2, which is no mul"),
    ):
        HOSTS["unet"].run(unet)
    disable_coeff_adapters(unet)
    with pytest.raises(ValueError, match="are disabled, so that no name would count"), coeff_per_sample(unet, ["dog"]):
        pass


@pytest.mark.slow
def test_three_subjects_on_the_embedded_model() -> None:
    pipe = StableDiffusionPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    with_adapters(pipe, ("fox", "owl", "cupcake"), 0.05)
    prompts = ["a sks fox face on a blue background", "a sks owl on a pink background", "an owl", "a sks cupcake"]
    names = ["fox", "owl", None, "cupcake"]
    expected = alone(pipe, prompts, names, range(4), guidance_scale=2.5)
    with coeff_per_sample(pipe, names):
        images = generated(pipe, prompts, range(4), guidance_scale=2.5)
    for one, other in zip(images, expected, strict=True):
        same(one, other)
    assert abs(generated(pipe, prompts[:1], [0], guidance_scale=2.5)[0] - images[0]).max() > 1e-2  # the last is active
