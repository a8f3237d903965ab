"""The tab to create images: base and adapted side by side, over the weight, a subject per image, attention maps."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr
from PIL import Image

from ..commands.maps import maps_sheet
from ..serving.requests import MAX_SEED, ImageRequest
from .messages import told
from .pipeline import SharedPipeline
from .visitors import Visitor, Visitors

LOWEST, HIGHEST = -1.0, 2.0  # of a weight
STRIP = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
MIXED = 4  # subjects that can be mixed
MOST_IMAGES = 24  # of the grid
STEPS = 25  # to begin with
HEADS = 8  # in a row of the maps
WORDS = "{subject}"  # of a prompt, where the subject's own words go

NO_SUBJECTS = "There are none yet: train one, or drop a file in Inspect."
BUTTONS: list[Any] = ["download", "fullscreen"]  # of images
GALLERY_BUTTONS: list[Any] = ["download", "download_all", "fullscreen"]
PROGRESS = gr.Progress()  # as a default, it asks Gradio for the page's progress bar

Captioned = list[tuple[Image.Image, str]]


@dataclass(frozen=True)
class Asked:
    """What the controls of the tab say.

    Args:
        subjects: name -> weight.
        prompt: may hold `WORDS`.
        options: of an `ImageRequest`: seed, steps, guidance, negative prompt, size.
    """

    subjects: dict[str, float]
    prompt: str
    options: dict[str, Any]

    def request(self, visitor: Visitor, subjects: dict[str, float] | None = None) -> ImageRequest:
        """An image by these subjects instead of the chosen; by none, the base model's, of the same prompt."""
        mixture = self.subjects if subjects is None else subjects
        named = [*mixture, *self.subjects]
        prompt = with_words(self.prompt, visitor.subject(named[0]).words if named else "")
        adapters = {visitor.subject(name).adapter: weight for name, weight in mixture.items()}
        return ImageRequest(prompt=prompt, subject=adapters or None, **self.options)


def with_words(prompt: str, words: str) -> str:
    """The prompt with the subject's words in the place of `{subject}`.

    Raises:
        ValueError: if the prompt is empty, or there are no words to put there.
    """
    if not prompt.strip():
        raise ValueError("the prompt is empty: say what the image shows")
    if WORDS in prompt and not words:
        raise ValueError(
            f"there are no words for {WORDS}: choose a subject whose file says its own, or write them out"
        )
    return prompt.replace(WORDS, words)


def side_by_side(shared: SharedPipeline, visitor: Visitor, asked: Asked, progress: Any) -> tuple[Any, Any]:
    """The base model's image and the adapted one, of one batch."""
    requests = [asked.request(visitor, {}), asked.request(visitor)]
    base, adapted = shared.make(requests, progress, visitor.gone)
    return base, adapted


def over_the_weight(shared: SharedPipeline, visitor: Visitor, asked: Asked, progress: Any) -> Captioned:
    """Images in which the first subject has the weights of `STRIP`; the others keep theirs."""
    if not asked.subjects:
        raise ValueError("choose a subject, whose weight is changed")
    first, *others = asked.subjects
    mixtures = [{first: weight} | {name: asked.subjects[name] for name in others} for weight in STRIP]
    images = shared.make([asked.request(visitor, each) for each in mixtures], progress, visitor.gone)
    return [(image, f"{weight:g}") for image, weight in zip(images, STRIP)]


def a_subject_each(
    shared: SharedPipeline, visitor: Visitor, asked: Asked, names: Sequence[str], each: int, progress: Any
) -> Captioned:
    """`each` images of every subject, by its own coefficients and words, with seeds one after the other."""
    if not names:
        raise ValueError("choose the subjects of the grid")
    if len(names) * each > MOST_IMAGES:
        raise ValueError(f"the grid can have {MOST_IMAGES} images, and not {len(names)} x {each}: choose fewer")
    first = asked.options["seed"]
    rows = [
        (name, replace(asked, options=asked.options | {"seed": first + n}).request(visitor, {name: 1.0}))
        for n in range(each)
        for name in names
    ]
    images = shared.make([request for _, request in rows], progress, visitor.gone)
    return [(image, f"{name}, seed {request.seed}") for image, (name, request) in zip(images, rows)]


def where_heads_look(
    shared: SharedPipeline, visitor: Visitor, asked: Asked, word: str, layers: int, progress: Any
) -> Image.Image:
    """A sheet of the layers whose maps of a word change most, before and after mixing."""
    if not word.strip():
        raise ValueError("write a word of the prompt, as it stands there")
    request = asked.request(visitor)
    words = visitor.subject(next(iter(asked.subjects))).words if asked.subjects else ""
    word = with_words(word, words).strip()
    found = shared.maps(request, word, progress, visitor.gone)
    title = f"{word!r} in {request.prompt!r}"
    return maps_sheet(found, title, found.most_changed()[:layers], cell=80, columns=HEADS)


def weights_of(names: Sequence[str], before: dict[str, float]) -> dict[str, float]:
    """The weight of each chosen subject: what it was, or 1."""
    return {name: before.get(name, 1.0) for name in names}


def options_of(
    takes: Any, negative_prompt: str | None, seed: float | None, steps: float, guidance: float, size: float | None
) -> dict[str, Any]:
    """Those of an `ImageRequest` that the pipeline's call takes. Raises ValueError for a seed that is none."""
    if seed is None or not 0 <= seed <= MAX_SEED - 10_000:
        raise ValueError("the seed must be a whole number, 0 or more")
    given = {
        "negative_prompt": (negative_prompt or "").strip() or None,
        "num_inference_steps": int(steps),
        "guidance_scale": float(guidance),
        "height": int(size) if size else None,
        "width": int(size) if size else None,
    }
    return {"seed": int(seed)} | {name: value for name, value in given.items() if value is not None and name in takes}


@dataclass(frozen=True)
class CreateTab:
    """What other tabs set: the choice of subjects, in both places."""

    chosen: gr.Dropdown
    of_grid: gr.Dropdown
    refresh: Callable[..., Any]


@dataclass(frozen=True)
class _Controls:
    """What all images of the tab are made by."""

    chosen: gr.Dropdown
    weighed: gr.State
    sliders: list[gr.Slider]
    prompt: gr.Textbox
    another: gr.Button
    options: list[Any]

    @property
    def inputs(self) -> list[Any]:
        return [self.chosen, self.weighed, *self.sliders, self.prompt, *self.options]


@dataclass(frozen=True)
class _Results:
    """Of each way to look at subjects, its button, what it alone asks for, and where its images go."""

    make: gr.Button
    pictures: list[Any]
    make_strip: gr.Button
    strip: gr.Gallery
    of_grid: gr.Dropdown
    each: gr.Slider
    make_grid: gr.Button
    grid: gr.Gallery
    word: gr.Textbox
    layers: gr.Slider
    make_maps: gr.Button
    maps: gr.Image


def _controls(shared: SharedPipeline, names: list[str]) -> _Controls:
    settings, takes, defaults = shared.settings, shared.takes, shared.defaults
    guidance_scale = 1.0 if defaults.get("guidance_scale") is None else float(defaults["guidance_scale"])
    first = names[:1]
    chosen = gr.Dropdown(
        names, value=first, multiselect=True, max_choices=MIXED, label="Subjects", elem_id="chosen",
        info=f"Up to {MIXED}, by weight; none is the base model." if names else NO_SUBJECTS,
    )  # fmt: skip
    sliders = [
        gr.Slider(
            LOWEST, HIGHEST, value=1.0, step=0.05, visible=n < len(first), elem_id=f"weight-{n}",
            label=f"Weight of {first[0]}" if n < len(first) else "Weight",
        )
        for n in range(MIXED)
    ]  # fmt: skip
    weighed = gr.State(first)  # the subjects that the sliders are of
    prompt = gr.Textbox(
        f"{WORDS} on a blue background" if first else "", label="Prompt", lines=2, elem_id="prompt",
        info=f"{WORDS}: the words it was trained with.",
    )  # fmt: skip
    with gr.Row(equal_height=True, elem_classes="seed"):
        seed = gr.Number(0, label="Seed", precision=0, min_width=100, scale=3, elem_id="seed")
        another = gr.Button("Another", size="sm", min_width=90, scale=2, elem_id="another")
    steps = gr.Slider(
        1, settings.max_num_inference_steps, value=min(STEPS, settings.max_num_inference_steps), step=1,
        label="Steps", elem_id="steps",
    )  # fmt: skip
    with gr.Accordion("More settings", open=False):
        negative = gr.Textbox("", label="Negative prompt", visible="negative_prompt" in takes, elem_id="negative")
        guidance = gr.Slider(
            0, 20, value=guidance_scale, step=0.1, label="Guidance scale", visible="guidance_scale" in takes,
            elem_id="guidance",
        )  # fmt: skip
        size = gr.Number(
            0, label="Side in pixels", info="0 is the model's own.", precision=0, visible="height" in takes,
            elem_id="size",
        )  # fmt: skip
    return _Controls(chosen, weighed, sliders, prompt, another, [negative, seed, steps, guidance, size])


def _results(names: list[str]) -> _Results:
    first = names[:1]
    with gr.Tab("Side by side"):
        make = gr.Button("Create", variant="primary", elem_id="make")
        with gr.Row():
            base = _picture("Base model", "base")
            adapted = _picture("With the subjects", "adapted")
    with gr.Tab("Over the weight"):
        gr.Markdown("The first subject's weight goes from -1 to 2; other subjects keep theirs.")
        make_strip = gr.Button("Create the strip", variant="primary", elem_id="make-strip")
        strip = _gallery("strip", columns=len(STRIP))
    with gr.Tab("A subject each"):
        gr.Markdown("Every image has a subject of its own, and one batch can hold all of them.")
        with gr.Row(equal_height=True):
            of_grid = gr.Dropdown(
                names, value=names[:4], multiselect=True, label="Subjects of the grid", scale=3,
                elem_id="of-grid",
            )  # fmt: skip
            each = gr.Slider(1, 6, value=2, step=1, label="Images of each", scale=2, elem_id="each")
        make_grid = gr.Button("Create the grid", variant="primary", elem_id="make-grid")
        grid = _gallery("grid", columns=4)
    with gr.Tab("Attention maps"):
        gr.Markdown("Where each head looks for a word of the prompt, before and after its maps are mixed.")
        with gr.Row(equal_height=True):
            word = gr.Textbox(
                WORDS if first else "", label="Word, or several in a row, of the prompt", scale=3,
                elem_id="word",
            )  # fmt: skip
            layers = gr.Slider(1, 6, value=2, step=1, label="Layers that change most", scale=2)
        make_maps = gr.Button("Draw the maps", variant="primary", elem_id="make-maps")
        maps = gr.Image(
            format="png", type="pil", label="Maps", show_label=False, interactive=False, buttons=BUTTONS,
            elem_id="maps",
        )  # fmt: skip
    return _Results(
        make, [base, adapted], make_strip, strip, of_grid, each, make_grid, grid, word, layers, make_maps, maps
    )


def create_tab(shared: SharedPipeline, visitors: Visitors) -> CreateTab:
    """The tab's controls and what they do."""
    settings, takes, names = shared.settings, shared.takes, shared.names()
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=320):
            controls = _controls(shared, names)
        with gr.Column(scale=5, min_width=480), gr.Tabs():
            results = _results(names)

    def read(names: list[str], weighed: list[str], *given: Any) -> Asked:
        weights, (prompt, *options) = dict(zip(weighed, given)), given[MIXED:]
        return Asked(weights_of(names or [], weights), prompt or "", options_of(takes, *options))

    @told
    def on_make(request: gr.Request, progress: gr.Progress = PROGRESS, *given: Any) -> Any:
        return side_by_side(shared, visitors.of(request.session_hash), read(*given), steps_on(progress))

    @told
    def on_strip(request: gr.Request, progress: gr.Progress = PROGRESS, *given: Any) -> Any:
        return over_the_weight(shared, visitors.of(request.session_hash), read(*given), steps_on(progress))

    @told
    def on_grid(request: gr.Request, progress: gr.Progress = PROGRESS, *given: Any) -> Any:
        *given_first, names, each = given
        asked, visitor = read(*given_first), visitors.of(request.session_hash)
        images = a_subject_each(shared, visitor, asked, names, int(each), steps_on(progress))
        return gr.Gallery(images, columns=min(len(names), 8))  # a row for each seed

    @told
    def on_maps(request: gr.Request, progress: gr.Progress = PROGRESS, *given: Any) -> Any:
        *given_first, word, layers = given
        asked, visitor = read(*given_first), visitors.of(request.session_hash)
        return where_heads_look(shared, visitor, asked, word, int(layers), steps_on(progress))

    @told
    def on_choice(names: list[str], weighed: list[str], *values: float) -> list[Any]:
        now = weights_of(names or [], dict(zip(weighed, values)))
        shown = [gr.Slider(value=weight, label=f"Weight of {name}", visible=True) for name, weight in now.items()]
        return [list(now), *shown, *[gr.Slider(visible=False)] * (MIXED - len(shown))]

    @told
    def refresh(request: gr.Request) -> tuple[Any, Any]:
        names = visitors.of(request.session_hash).subjects()
        return gr.Dropdown(choices=names), gr.Dropdown(choices=names)

    calls: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": settings.concurrency_limit}
    private: dict[str, Any] = {"api_visibility": "private"}
    inputs = controls.inputs
    gr.on([results.make.click, controls.prompt.submit], on_make, inputs, results.pictures, **calls, **private)
    results.make_strip.click(on_strip, inputs, results.strip, **calls, **private)
    of_grid: list[Any] = [results.of_grid, results.each]
    results.make_grid.click(on_grid, inputs + of_grid, results.grid, **calls, **private)
    of_maps: list[Any] = [results.word, results.layers]
    gr.on([results.make_maps.click, results.word.submit], on_maps, inputs + of_maps, results.maps, **calls, **private)
    of_sliders: list[Any] = [controls.weighed, *controls.sliders]
    plain: dict[str, Any] = private | {"show_progress": "hidden", "queue": False}
    controls.chosen.change(on_choice, [controls.chosen, *of_sliders], of_sliders, **plain)
    controls.another.click(lambda: secrets.randbelow(2**32), None, controls.options[1], **plain)
    return CreateTab(controls.chosen, results.of_grid, refresh)


def steps_on(progress: gr.Progress) -> Callable[[int, int], None]:
    """Tells the page's progress bar of steps."""
    return lambda done, of: progress((done, of), desc="Denoising", unit="steps")


def _picture(label: str, elem_id: str) -> gr.Image:
    return gr.Image(
        format="png",
        type="pil",
        label=label,
        interactive=False,
        height=400,
        buttons=BUTTONS,
        elem_id=elem_id,
        elem_classes="picture",
    )


def _gallery(elem_id: str, columns: int) -> gr.Gallery:
    return gr.Gallery(
        format="png", show_label=False, columns=columns, object_fit="contain", height="auto", interactive=False,
        buttons=GALLERY_BUTTONS, elem_id=elem_id, elem_classes="pictures",
    )  # fmt: skip
