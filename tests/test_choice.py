"""The choice of adapters belongs to the call, its thread or its task: calls at once get what each gets alone."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import functools
import inspect
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tiny_models
import torch
from diffusers import StableDiffusionPipeline
from hosts import HOSTS, visible
from test_per_sample import generated, same, tiny_pipeline, with_adapters
from tiny_models import FAMILIES
from torch.utils.checkpoint import checkpoint

import coeff_diffusers.checkpoint as checkpoint_file
from coeff_diffusers import (
    coeff_adapters,
    coeff_disabled,
    coeff_parameters,
    coeff_per_sample,
    coeff_state_dict,
    delete_coeff_adapters,
    disable_coeff_adapters,
    get_active_coeff_adapters,
    list_coeff_adapters,
    load_coeff_weights,
    save_coeff_weights,
    set_coeff_adapters,
    unload_coeff_weights,
)

Image = Any


@pytest.fixture
def pipe():
    """Three adapters as they come from files, the second active."""
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    other = with_adapters(tiny_pipeline(), ("dog", "cat", "owl"))
    for name in ("dog", "owl", "cat"):
        load_coeff_weights(pipe, coeff_state_dict(other, name), adapter_name=name)
    return pipe


def twin(pipe):
    """Another pipeline of the same models, with a scheduler and a tokenizer of its own, which threads cannot share."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    own = {"scheduler": scheduler, "tokenizer": copy.deepcopy(pipe.tokenizer)}
    twin = StableDiffusionPipeline(**{**pipe.components, **own}, requires_safety_checker=False)
    twin.set_progress_bar_config(disable=True)
    return twin


def image(pipe, **kwargs) -> Image:
    return generated(pipe, ["a dog"], [0], **kwargs)


def chosen(**coeff: Any) -> dict[str, Any]:
    return {"cross_attention_kwargs": coeff}


def equal(one: Image, other: Image) -> bool:
    return bool((one == other).all())


def together(pipe, *calls: Callable[[Any], Image]) -> list[Image]:
    """The calls, each in a thread and on a pipeline of its own, which meet in the middle of every forward pass."""
    meet = threading.Barrier(len(calls), timeout=60)

    def wait(*_: Any) -> None:
        meet.wait()

    hook = pipe.unet.mid_block.register_forward_pre_hook(wait)
    try:
        with ThreadPoolExecutor(len(calls)) as threads:
            found = [threads.submit(call, twin(pipe)) for call in calls]
            return [future.result(timeout=60) for future in found]
    finally:
        hook.remove()


def within(context: Callable[..., Any], *args: Any) -> Callable[[Any], Image]:
    def call(pipe):
        with context(pipe, *args):
            return image(pipe)

    return call


# Each beside each: what a server does.
WAYS: dict[str, Callable[[Any], Image]] = {
    "plain": image,
    "a context": within(coeff_adapters, "dog"),
    "another": within(coeff_adapters, ["dog", "owl"], [0.5, -1.0]),
    "disabled": within(coeff_disabled),
    "per sample": within(coeff_per_sample, ["owl"]),
    "per sample, another": within(coeff_per_sample, ["dog"]),
    "in the call": lambda pipe: image(pipe, **chosen(coeff=["dog"])),
    "scaled in the call": lambda pipe: image(pipe, **chosen(coeff={"owl": 0.5, "dog": 1.0}, coeff_scale=0.5)),
    "scaled": lambda pipe: image(pipe, **chosen(coeff_scale=0.25)),
}


def test_calls_in_threads_get_what_each_gets_alone(pipe) -> None:
    alone = [call(pipe) for call in WAYS.values()]
    a_dog = [1, 5, 6]  # said in three ways
    pairs = [pair for pair in itertools.combinations(range(len(alone)), 2) if equal(*(alone[n] for n in pair))]
    assert pairs == list(itertools.combinations(a_dog, 2))
    found = together(pipe, *WAYS.values())
    assert [name for name, one, other in zip(WAYS, found, alone, strict=True) if not equal(one, other)] == []
    assert get_active_coeff_adapters(pipe) == {"cat": 1.0}


def test_a_call_s_own_choice_beats_the_thread_s_and_the_model_s(pipe) -> None:
    with coeff_adapters(pipe, "dog"):
        dog = image(pipe)
    with coeff_disabled(pipe):
        base = image(pipe)
    for context in (coeff_adapters(pipe, "owl"), coeff_per_sample(pipe, ["owl"]), coeff_disabled(pipe)):
        with context:
            assert equal(image(pipe, **chosen(coeff="dog")), dog)
            assert equal(image(pipe, **chosen(coeff=None)), base)
    disable_coeff_adapters(pipe)
    assert equal(image(pipe, **chosen(coeff="dog")), dog)
    assert equal(image(pipe), base)


def test_forms_of_a_call_s_choice(pipe) -> None:
    with coeff_adapters(pipe, "dog", 0.8):
        expected = image(pipe)
    for form in (("dog", 0.8), {"dog": 0.8}, [("dog", 0.8)], [{"dog": 0.8}]):
        same(image(pipe, **chosen(coeff=form)), expected)  # of one sample, its own matrix
    with coeff_adapters(pipe, ["dog", "cat"], [0.5, 0.25]):
        expected = image(pipe)
    mixed = generated(pipe, ["a dog"] * 2, [0, 0], **chosen(coeff=[None, {"dog": 1.0, "cat": 0.5}], coeff_scale=0.5))
    same(mixed[1:], expected)
    with coeff_disabled(pipe):
        same(mixed[:1], image(pipe))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("bird", r"has no adapter \['bird'\]; it has \['dog', 'owl', 'cat'\]"),
        (["dog", {"bird": 1.0}], r"has no adapter \['bird'\]"),
        ([], "an entry for each prompt or image, got an empty list"),
        ({}, r"coeff must be a name .* got \{\}"),
        (3, "coeff must be a name .* got 3"),
        (("dog", "cat"), "must give names finite numbers as weights, got 'dog': 'cat'"),
        ([["dog"]], r"coeff must be a name .* got \['dog'\]"),
        ({"dog": float("inf")}, "finite numbers as weights, got 'dog': inf"),
        (["dog", "cat"], "adapters are named for 2 images, the call has 1 prompts"),
    ],
)
def test_other_forms_are_refused_before_the_denoiser_computes(pipe, given, message) -> None:
    def forward(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was computed")

    pipe.unet.conv_in.forward = forward
    with pytest.raises(ValueError, match=message):
        image(pipe, **chosen(coeff=given))
    del pipe.unet.conv_in.forward
    with coeff_disabled(pipe):
        image(pipe)


def test_contexts_leave_one_another_as_they_are_in_any_order(pipe) -> None:
    plain = image(pipe)
    for contexts in (
        [coeff_disabled(pipe), coeff_disabled(pipe)],
        [coeff_adapters(pipe, "dog"), coeff_adapters(pipe, "owl"), coeff_disabled(pipe)],
    ):
        for context in contexts:
            context.__enter__()
        for context in contexts:
            context.__exit__(None, None, None)
        assert get_active_coeff_adapters(pipe) == {"cat": 1.0}
        assert equal(image(pipe), plain)
    first, second = coeff_adapters(pipe, "dog"), coeff_adapters(pipe, "owl")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert get_active_coeff_adapters(pipe) == {"owl": 1.0}
    second.__exit__(None, None, None)
    with coeff_adapters(pipe, "dog"):
        with coeff_disabled(pipe), pytest.raises(ValueError, match="are disabled.*or leave coeff_disabled"):
            coeff_adapters(pipe, "owl").__enter__()
        assert get_active_coeff_adapters(pipe) == {"dog": 1.0}


def test_tasks_of_one_thread_have_choices_of_their_own(pipe) -> None:
    names = ["dog", "owl", "cat", None]
    expected = []
    for name in names:
        with coeff_disabled(pipe) if name is None else coeff_adapters(pipe, name):
            expected.append(image(pipe))

    async def one(name: str | None, turn: asyncio.Barrier) -> list[Image]:
        with coeff_disabled(pipe) if name is None else coeff_adapters(pipe, name):
            await turn.wait()  # all have entered
            here = image(twin(pipe))
            there = await asyncio.to_thread(image, twin(pipe))
            await turn.wait()
        return [here, there]

    async def all_of_them() -> list[list[Image]]:
        turn = asyncio.Barrier(len(names))
        return await asyncio.gather(*(one(name, turn) for name in names))

    for found, wanted in zip(asyncio.run(all_of_them()), expected, strict=True):
        assert all(equal(each, wanted) for each in found)
    assert get_active_coeff_adapters(pipe) == {"cat": 1.0}


def paused(pipe, change: Callable[[], Any], call: Callable[[Any], Image] = image) -> Image:
    """A call, in a thread of its own, in whose first forward pass something else is done here."""
    reached, go_on = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            reached.set()
            assert go_on.wait(60)

    hook = pipe.unet.mid_block.register_forward_pre_hook(wait)
    try:
        with ThreadPoolExecutor(1) as thread:
            future = thread.submit(call, twin(pipe))
            try:
                assert reached.wait(60)
                change()
            finally:
                go_on.set()
            return future.result(timeout=60)
    finally:
        hook.remove()


def swap(pipe) -> None:
    load_coeff_weights(pipe, coeff_state_dict(pipe, "owl"), adapter_name="cat", hotswap=True)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "hotswap": swap,
    "set": lambda pipe: set_coeff_adapters(pipe, "owl"),
    "disable": disable_coeff_adapters,
    "load": lambda pipe: load_coeff_weights(pipe, coeff_state_dict(pipe, "owl"), adapter_name="new"),
    "delete": lambda pipe: delete_coeff_adapters(pipe, "cat"),
    "delete all": lambda pipe: delete_coeff_adapters(pipe, list_coeff_adapters(pipe)),
}


@pytest.mark.parametrize("trains", [False, True], ids=["loaded", "parameters"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_running_call_ends_with_what_it_began_with_and_the_next_has_the_new(pipe, change, trains) -> None:
    if trains:
        coeff_parameters(pipe)
    before = image(pipe)
    with coeff_disabled(pipe):
        base = image(pipe)
    with coeff_adapters(pipe, "owl"):
        owl = image(pipe)
    assert equal(paused(pipe, lambda: CHANGES[change](pipe)), before)
    assert equal(image(pipe), base if change in ("disable", "delete", "delete all") else owl)


def test_a_call_that_began_without_any_adapter_ends_without(pipe) -> None:
    bare = tiny_pipeline()
    bare.set_progress_bar_config(disable=True)
    base = image(bare)
    state = coeff_state_dict(pipe, "dog")
    assert equal(paused(bare, lambda: load_coeff_weights(bare, state)), base)
    assert not equal(image(bare), base)


def test_taking_all_off_under_a_running_call_is_refused(pipe) -> None:
    before = image(pipe)

    def unload() -> None:
        with pytest.raises(RuntimeError, match="other threads are calling this model"):
            unload_coeff_weights(pipe)

    assert equal(paused(pipe, unload), before)
    assert equal(image(pipe), before)
    unload_coeff_weights(pipe)
    assert not pipe.unet._forward_pre_hooks
    assert not pipe.unet._forward_hooks


def test_a_call_that_failed_is_over_though_its_traceback_is_kept(pipe) -> None:
    def fail(*args) -> None:
        raise KeyError("in the middle")

    with ThreadPoolExecutor(1) as executor:
        failed = executor.submit(pipe, "a dog", num_inference_steps=2, callback_on_step_end=fail)
        assert isinstance(failed.exception(), KeyError)
        executor.submit(int).result()
        unload_coeff_weights(pipe)
    assert not pipe.unet._forward_pre_hooks


def test_a_choice_whose_adapter_is_deleted_is_refused_by_name(pipe) -> None:
    with coeff_adapters(pipe, "dog"):
        delete_coeff_adapters(pipe, "dog")
        with pytest.raises(ValueError, match=r"\['dog'\] were deleted since they were chosen here"):
            image(pipe)
    image(pipe)


def test_per_sample_speaks_of_the_pipeline_it_was_given(pipe) -> None:
    other = twin(pipe)
    with coeff_per_sample(pipe, ["dog"]):
        with pytest.raises(ValueError, match="entered for another pipeline, a StableDiffusionPipeline, than this"):
            image(other)
        mine = image(pipe)
    with coeff_adapters(pipe, "dog"):
        same(image(other), mine)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("per_image", [False, True])
def test_gradient_checkpointing_runs_again_what_was_run(unet, per_image, reentrant) -> None:
    """Also where the backward pass is another thread's, as on a GPU, and the choice has changed since."""
    with_adapters(unet)
    host = HOSTS["unet"]
    unet.requires_grad_(False).train()

    def forward(name: str) -> torch.Tensor:
        with coeff_per_sample(unet, [name, None]) if per_image else coeff_adapters(unet, name, 0.5):
            inputs = host.inputs()
            inputs["sample"].requires_grad_(reentrant)
            return unet(**inputs, return_dict=False)[0]

    def gradients(backward: Callable[[torch.Tensor], Any], *names: str) -> list[torch.Tensor]:
        for parameter in coeff_parameters(unet):
            parameter.grad = None
        backward(sum(forward(name).square().mean() * weight for name, weight in zip(names, (1.0, -2.0))))  # type: ignore[arg-type]
        return [torch.zeros(0) if p.grad is None else p.grad.clone() for p in coeff_parameters(unet)]

    def elsewhere(loss: torch.Tensor) -> None:
        set_coeff_adapters(unet, "cat", 3.0)
        thread = threading.Thread(target=contextvars.Context().run, args=(loss.backward,))
        thread.start()
        thread.join()

    cases = [("dog",), ("dog", "cat")]  # one forward pass, and two in one backward pass
    expected = [gradients(lambda loss: loss.backward(), *names) for names in cases]
    unet.enable_gradient_checkpointing()
    if reentrant:
        unet._set_gradient_checkpointing(True, functools.partial(checkpoint, use_reentrant=True))
    for names, wanted in zip(cases, expected, strict=True):
        torch.testing.assert_close(gradients(elsewhere, *names), wanted, rtol=1e-4, atol=1e-4)  # sums of two passes


# The layout of a denoiser's batch, of every family: guidance outside, then prompts, then the images of each.


@pytest.mark.parametrize("family", FAMILIES)
def test_each_image_of_each_family_has_its_prompt_s_adapter(family) -> None:
    pipe = with_adapters(tiny_models.tiny_pipeline(family), ["dog"])
    pipe.set_progress_bar_config(disable=True)
    steps = 2 if family in ("QwenImagePipeline", "PixArtAlphaPipeline") else 1  # which have a way of their own for 1
    settings = tiny_models.call_settings(family, num_inference_steps=steps)
    settings["output_type"] = "latent"
    parameters = inspect.signature(pipe.__call__).parameters
    given = next((name for name in parameters if name.endswith("attention_kwargs")), None)

    def run(prompts: int, each: int, **more: Any) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(n) for n in range(prompts * each)]
        call = settings | {"prompt": ["a sks fox"] * prompts, "num_images_per_prompt": each}
        return pipe(**call, generator=generators, **more).images

    with coeff_disabled(pipe):
        base = run(2, 2)
    dog = run(2, 2)
    apart = (dog - base).abs().flatten(1).amax(1)
    assert apart.min() > 1e-3
    for names in (["dog", None], [None, "dog", "dog", None]):
        wanted = [name for name in names for _ in range(4 // len(names))]
        with coeff_per_sample(pipe, names):
            found = [run(2, 2)]
        if given is not None:
            found.append(run(2, 2, **{given: {"coeff": names}}))
            torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
        for n, name in enumerate(wanted):
            difference = (found[0][n] - (base if name is None else dog)[n]).abs().max()
            assert difference < 0.1 * apart[n]  # large random weights make much of a matrix that is applied otherwise


# torch.compile


@pytest.mark.slow
@pytest.mark.parametrize("way", ["compile", "in place", "blocks"])
def test_compiled_calls_in_threads_and_no_adapter_compiles_again(way) -> None:
    torch.manual_seed(0)
    host = HOSTS["flux" if way == "blocks" else "sd3"]
    model = visible(host.build().eval())
    source = with_adapters(copy.deepcopy(model), ("dog", "cat", "owl"))
    states = {name: coeff_state_dict(source, name) for name in ("dog", "cat", "owl")}
    for name in ("dog", "cat"):
        load_coeff_weights(model, states[name], adapter_name=name)
    plain = copy.deepcopy(model)
    load_coeff_weights(plain, states["owl"], adapter_name="owl")
    torch._dynamo.reset()
    called = model
    if way == "compile":
        called = torch.compile(model, backend="aot_eager", fullgraph=True)
    elif way == "in place":
        model.compile(backend="eager", fullgraph=True)  # what is asked is dynamo's: graphs and their guards
    else:
        model.compile_repeated_blocks(backend="eager")

    @torch.no_grad()
    def run(model, name, weight, **given):
        with coeff_adapters(model, name, weight):
            return model(**host.inputs(), return_dict=False, joint_attention_kwargs=given or None)[0]

    def close(one, other):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)  # other sums

    close(run(called, "dog", 1.0), run(plain, "dog", 1.0))
    load_coeff_weights(called, states["owl"], adapter_name="owl")
    with torch._dynamo.config.patch(error_on_recompile=True):
        cases = [("dog", 0.5), ("cat", 1.0), ("owl", -1.5), ("owl", 1.0)]
        with ThreadPoolExecutor(2) as threads:
            for one, case in zip(threads.map(lambda case: run(called, *case), cases * 2), cases * 2, strict=True):
                close(one, run(plain, *case))
        close(run(called, "dog", 1.0, coeff="cat", coeff_scale=0.5), run(plain, "cat", 0.5))
        set_coeff_adapters(called, "cat", 0.3)
        load_coeff_weights(called, states["dog"], adapter_name="cat", hotswap=True)
        with torch.no_grad():
            out = called(**host.inputs(), return_dict=False, joint_attention_kwargs=None)[0]
        close(out, run(plain, "dog", 0.3))


@pytest.mark.slow
def test_a_choice_that_was_entered_for_the_model_within_breaks_the_graph_and_is_heard() -> None:
    torch.manual_seed(0)
    host = HOSTS["sd3"]
    model = with_adapters(visible(host.build().eval()))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")  # dynamo alone breaks graphs
    with torch.no_grad():
        for context in (
            coeff_adapters(model, "dog", 0.5),
            coeff_disabled(model),
            coeff_per_sample(model, ["dog", None]),
        ):
            before = host.run(compiled)
            with context:
                torch.testing.assert_close(host.run(compiled), host.run(model), rtol=1e-4, atol=1e-4)  # other sums
                assert (host.run(compiled) - before).abs().max() > 1e-2
            torch.testing.assert_close(host.run(compiled), before, rtol=1e-4, atol=1e-4)


def test_an_interrupted_call_leaves_nothing_for_gradient_checkpointing(pipe) -> None:
    unet = pipe.unet.train()
    unet.enable_gradient_checkpointing()
    parameters = coeff_parameters(unet)
    inputs = torch.randn(1, 4, 8, 8), 5, torch.randn(1, 7, unet.config.cross_attention_dim)

    def gradients() -> list[torch.Tensor]:
        outputs = []
        for name in ("dog", "owl"):
            with coeff_adapters(unet, name):
                outputs.append(unet(*inputs).sample.square().mean())
        return list(torch.autograd.grad(sum(outputs), parameters, allow_unused=True, materialize_grads=True))

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    expected = gradients()
    hook = unet.mid_block.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        unet(*inputs)
    hook.remove()
    torch.testing.assert_close(gradients(), expected)


def test_names_are_checked_again_when_a_file_was_read(pipe, monkeypatch, tmp_path) -> None:
    path = save_coeff_weights(pipe, tmp_path, adapter_name="owl")
    state = coeff_state_dict(pipe, "dog")
    before = list_coeff_adapters(pipe)

    def read(path, read=checkpoint_file.read_file):
        load_coeff_weights(pipe, state, adapter_name="new")  # as another thread does
        return read(path)

    monkeypatch.setattr(checkpoint_file, "read_file", read)
    with pytest.raises(ValueError, match="adapter 'new' is in use"):
        load_coeff_weights(pipe, path, adapter_name="new")
    assert list_coeff_adapters(pipe) == [*before, "new"]
    assert all(torch.equal(delta, state[key]) for key, delta in coeff_state_dict(pipe, "new").items())
