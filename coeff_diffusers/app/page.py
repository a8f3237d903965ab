"""The page: its look, its tabs, and who comes and goes."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import gradio as gr

from .create import create_tab
from .inspect_file import inspect_tab
from .pipeline import SharedPipeline
from .train import train_tab
from .visitors import Visitors

DAY = 24 * 3600  # seconds that an uploaded file is kept
FONTS = ["system-ui", "sans-serif"]  # those of the machine: the page asks no other server for anything
MONOSPACE = ["ui-monospace", "monospace"]

CSS = """
.gradio-container {width: 100%; max-width: 1240px !important; margin: 0 auto;}
.html-container {padding: 0 !important;}
.top {display: flex; align-items: baseline; gap: 12px; flex-wrap: wrap; padding: 4px 0;}
.top h1 {font-size: 22px; font-weight: 650; margin: 0;}
.top span {color: var(--body-text-color-subdued); font-size: 14px;}
.picture img {width: 100%; height: 100%; object-fit: contain;}
.pictures img {width: 100%; object-fit: contain;}
.panel {padding: 10px 12px; border-radius: 8px; border-left: 4px solid; overflow-wrap: anywhere; font-size: 14px;}
.panel ul {margin: 6px 0 0 18px; list-style: disc; max-height: 320px; overflow-y: auto;}
.panel.good {border-color: #15803d; background: color-mix(in srgb, #15803d 12%, transparent);}
.panel.bad {border-color: #b91c1c; background: color-mix(in srgb, #b91c1c 10%, transparent);}
.panel.plain {border-color: var(--color-accent); background: var(--background-fill-secondary);}
.bar {height: 6px; margin-top: 6px; border-radius: 3px; background: var(--border-color-primary); overflow: hidden;}
.bar div {height: 100%; background: var(--color-accent); transition: width 0.5s;}
table.facts, table.facts tr, table.facts th, table.facts td {border: none !important;}
table.facts {width: 100%; font-size: 14px; border-collapse: collapse;}
table.facts th {text-align: left; font-weight: 500; white-space: nowrap; padding: 5px 14px 5px 0 !important;
    vertical-align: top; color: var(--body-text-color-subdued);}
table.facts td {padding: 5px 0 !important; overflow-wrap: anywhere;}
table.facts tr + tr {border-top: 1px solid var(--border-color-primary) !important;}
.pictures .grid-wrap {min-height: 0 !important; max-height: none !important;}
.pictures {min-height: 96px;}
#validation-images .grid-wrap {padding-top: 36px;}
.seed {align-items: end;}
.seed button {height: 40px; margin-bottom: 13px;}
.caption-row {align-items: center;}
"""


def theme() -> Any:
    hues: dict[str, Any] = {"primary_hue": "blue", "neutral_hue": "slate"}
    return gr.themes.Default(font=FONTS, font_mono=MONOSPACE, **hues)


def page(shared: SharedPipeline, visitors: Visitors) -> gr.Blocks:
    """The app's page.

    Args:
        shared: the base model.
        visitors: whose tabs are open; they leave when these are closed.
    """
    name = Path(shared.settings.pretrained_model_name_or_path)
    shown = "/".join(name.parts[-2:]) if name.is_absolute() else str(name)
    about = f"{type(shared.pipe).__name__} of {shown}, {len(shared.names())} subjects"
    blocks = gr.Blocks(title="coeff_diffusers", analytics_enabled=False, delete_cache=(3600, DAY), fill_width=True)
    with blocks:
        title = f"<h1>coeff_diffusers</h1><span>Many subjects, one frozen model. {html.escape(about)}</span>"
        gr.HTML(f'<div class="top">{title}</div>', padding=False)
        with gr.Tabs() as tabs:
            with gr.Tab("Create", id="create"):
                create = create_tab(shared, visitors)
            with gr.Tab("Inspect", id="inspect"):
                inspect_tab(shared, visitors, tabs, create)
            if shared.settings.train:
                with gr.Tab("Train", id="train"):
                    train_tab(shared, visitors, tabs, create)

        private: Any = {"api_visibility": "private"}

        def leave(request: gr.Request) -> None:
            visitors.leave(request.session_hash)

        blocks.load(create.refresh, None, [create.chosen, create.of_grid], show_progress="hidden", **private)
        blocks.unload(leave)
    return blocks
