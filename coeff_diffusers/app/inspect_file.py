"""The tab that looks into a coefficient file: what it says, where its Delta is large, whether it fits the model."""

from __future__ import annotations

import argparse
import html
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from ..arithmetic import read_checked, relative_norm
from ..commands import coeff_files
from ..plot import plot_layers
from .create import BUTTONS, CreateTab
from .messages import EXPECTED, text_of, told
from .pipeline import SharedPipeline
from .visitors import Visitor, Visitors

TOP = 12  # heads that are listed
DRAWN = 48  # layers that are drawn, at most
LISTED = 200  # layers, and differences, that are listed, at most


@dataclass(frozen=True)
class Report:
    """What there is to say of a file.

    Args:
        facts: name -> text, of what the file says of itself and its size.
        differences: part -> why it does not fit the base model; empty if it does.
        layers: path, heads, norm of Delta, norm relative to I's, those that move most first.
        heads: path, head, norm of its row, its largest entry and of which map.
        plot: PNG of Delta by layer.
    """

    facts: dict[str, str]
    differences: dict[str, str]
    layers: list[list[Any]]
    heads: list[list[Any]]
    plot: Path


def look_into(shared: SharedPipeline, file: Path, folder: Path) -> Report:
    """Reads a file, and draws it into `folder`.

    Raises:
        ValueError, OSError: if it is no coefficient file, or damaged.
    """
    tensors, header = read_checked(file)
    asked = argparse.Namespace(file=file, top=TOP, plot=None, growth=None)
    found = coeff_files.info(asked)[1]
    largest = sorted(tensors, key=lambda key: -relative_norm(tensors[key]))[:DRAWN]
    drawn = {key: delta for key, delta in tensors.items() if key in set(largest)}
    more = f", the {DRAWN} that move most" if len(tensors) > DRAWN else ""
    plot = folder / "delta.png"
    plot_layers(drawn, plot, f"{file.name}: {len(tensors)} layers{more}"[:150])
    layers = [[each["layer"], each["heads"], each["norm"], each["relative_norm"]] for each in found["layers"]]
    layers.sort(key=lambda row: -row[3])
    heads = [[e["layer"], e["head"], e["norm"], f"{e['entry']:+.3f} of map {e['source']}"] for e in found["heads"]]
    return Report(
        facts_of(found),
        shared.differences(tensors, header),
        [[*row[:2], round(row[2], 3), round(row[3], 3)] for row in layers[:LISTED]],
        [[*row[:2], round(row[2], 3), row[3]] for row in heads],
        plot,
    )


def facts_of(found: dict[str, Any]) -> dict[str, str]:
    """What `coeff-diffusers info` finds, as names and texts. All but the sizes is its writer's word."""
    header, own = found["header"], found["header"]["coeff_diffusers"]
    facts = {
        "Size": f"{found['coefficients']:,} coefficients in {len(found['layers'])} layers, {found['bytes']:,} bytes"
    }
    for component, said in own["base"].items():
        facts[f"Made for ({component})"] = f"{said['class']}, {len(said['heads'])} attention layers"
    named = {
        "instance_prompt": "Prompt",
        "steps": "Steps",
        "batch_size": "Batch size",
        "optimizer": "Optimizer",
        "learning_rate": "Learning rate",
        "resolution": "Resolution",
        "seed": "Seed",
        "modelspec.date": "Date",
    }
    facts |= {title: str(header[name]) for name, title in named.items() if header.get(name)}
    if own.get("made_from"):
        facts["Made from"] = str(own["made_from"])
    return {name[:80]: text[:300] for name, text in facts.items()}


def verdict(report: Report, name: str, model: str) -> str:
    """Whether the file fits, and what differs, as HTML."""
    if not report.differences:
        return _panel("good", f"{name} fits {model}", [])
    lines = [f"{what}: {why}" for what, why in report.differences.items()]
    more = [f"and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
    return _panel("bad", f"{name} does not fit {model}. What differs:", [*lines[:LISTED], *more])


def refused(name: str, error: BaseException, folder: Path) -> str:
    """Why a file cannot be looked into, as HTML; folders of the server are left out."""
    first, *lines = text_of(error).replace(f"{folder}{os.sep}", "").split("\n")
    return _panel("bad", f"{name} cannot be used: {first}", lines)


def _panel(kind: str, title: str, lines: list[str]) -> str:
    items = "".join(f"<li>{html.escape(line.strip())}</li>" for line in lines)
    return f'<div class="panel {kind}"><b>{html.escape(title)}</b>{f"<ul>{items}</ul>" if items else ""}</div>'


def table(facts: dict[str, str]) -> str:
    """Facts as HTML."""
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>" for name, text in facts.items()
    )
    return f'<table class="facts">{rows}</table>'


def inspect_tab(shared: SharedPipeline, visitors: Visitors, tabs: gr.Tabs, create: CreateTab) -> None:
    """The tab's controls and what they do."""
    model = type(shared.pipe).__name__
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=320):
            gr.Markdown("What a file says of itself, where its Delta is large, and whether it fits the model.")
            file = gr.File(label="A .safetensors file of coefficients", file_types=[".safetensors"], elem_id="file")
            answer = gr.HTML(padding=False, elem_id="verdict")
            use = gr.Button("Use it in Create", variant="primary", visible=False, elem_id="use")
            facts = gr.HTML(padding=False, elem_id="facts")
        with gr.Column(scale=5, min_width=480, visible=False) as results, gr.Tabs():
            with gr.Tab("Heatmaps of Delta"):
                plot = gr.Image(show_label=False, interactive=False, buttons=BUTTONS, elem_id="heatmaps")
            with gr.Tab("Layers that move most"):
                gr.Markdown(
                    "Relative is ||Delta|| / ||I||: how much is added to the maps, comparable between layers of any "
                    "number of heads."
                )
                layers = gr.Dataframe(
                    headers=["Layer", "Heads", "||Delta||", "Relative"],
                    datatype=["str", "number", "number", "number"],
                    column_widths=["66%", "9%", "13%", "12%"], interactive=False, elem_id="layers",
                )  # fmt: skip
            with gr.Tab("Heads that mix most"):
                gr.Markdown("The norm of a head's row of Delta, and the map that it takes most of.")
                heads = gr.Dataframe(
                    headers=["Layer", "Head", "Norm", "Largest entry"], datatype=["str", "number", "number", "str"],
                    column_widths=["64%", "8%", "8%", "20%"], interactive=False, elem_id="heads",
                )  # fmt: skip

    @told
    def on_file(path: str | None, request: gr.Request) -> list[Any]:
        nothing = [gr.Button(visible=False), "", gr.Column(visible=False), None, None, None]
        if path is None:
            return ["", *nothing]
        visitor, given = visitors.of(request.session_hash), Path(path)
        try:
            report = look_into(shared, given, visitor.folder)
        except EXPECTED as error:
            return [refused(given.name, error, given.parent), *nothing]
        fits = gr.Button(visible=not report.differences)
        shown = [gr.Column(visible=True), str(report.plot), report.layers, report.heads]
        return [verdict(report, given.name, model), fits, table(report.facts), *shown]

    @told
    def on_use(path: str | None, chosen: list[str], request: gr.Request) -> list[Any]:
        if path is None:
            raise ValueError("drop a file first")
        return used(visitors.of(request.session_hash), Path(path), Path(path).stem)

    outputs = [answer, use, facts, results, plot, layers, heads]
    file.change(on_file, file, outputs, show_progress_on=[answer], api_visibility="private")
    use.click(on_use, [file, create.chosen], [tabs, create.chosen, create.of_grid], api_visibility="private")


def used(visitor: Visitor, file: Path, name: str) -> list[Any]:
    """Loads a file for a visitor; the tab to create images, with this subject chosen."""
    taken = visitor.take(file, name)
    names = visitor.subjects()
    gr.Info(f"{taken} can be chosen now, in this tab of your browser.", duration=5)
    return [gr.Tabs(selected="create"), gr.Dropdown(choices=names, value=[taken]), gr.Dropdown(choices=names)]
