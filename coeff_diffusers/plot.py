"""Coefficients as an image: a heatmap of Delta for each layer, and how they grew over the steps of a run."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .arithmetic import relative_norm
from .checkpoint import COEFF_WEIGHT_NAME, KEY_SUFFIX
from .coeff_file import read_file
from .files import printable, whole_file

_CELL = 1.55  # inches, of a layer with its caption


def plot_layers(state_dict: Mapping[str, Tensor], path: Path, title: str) -> None:
    """Writes an image with Delta of each layer, rows output heads, columns source maps, on one colour scale.

    The scale ends at the 99.5th percentile of the magnitudes, lest one large entry blanch all others.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    columns = min(len(state_dict), max(4, math.ceil(math.sqrt(1.3 * len(state_dict)))))
    rows = math.ceil(len(state_dict) / columns)
    width, height = max(6.0, columns * _CELL + 1.2), rows * (_CELL + 0.35) + 0.9
    figure = _figure(width, height)
    figure.suptitle(f"{title}\nDelta: rows output heads i, columns source maps j", fontsize=10, parse_math=False)
    limit = float(torch.cat([delta.flatten() for delta in state_dict.values()]).abs().quantile(0.995)) or 1.0
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax, (key, delta) in zip(axes, state_dict.items()):
        image = ax.imshow(delta, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        ax.set_title(caption(key), fontsize=6, parse_math=False)
        ax.set_xlabel(f"{len(delta)} heads, norm {relative_norm(delta):.2f}", fontsize=6)
        ax.set_xticks([])
        ax.set_yticks([])
    for ax in axes[len(state_dict) :]:
        ax.set_axis_off()
    figure.colorbar(image, ax=figure.axes, shrink=min(1.0, 3.0 / height), pad=0.02, extend="both")
    _save(figure, path)


def plot_growth(run: Path, path: Path) -> list[int]:
    """Writes an image of ||Delta|| / ||I|| of each layer over the steps at which a run saved checkpoints.

    Args:
        run: the output folder of a run, with folders `checkpoint-N`.
        path: of the PNG.

    Returns:
        The steps.

    Raises:
        ValueError: if there are fewer than two checkpoints with coefficients of one subject.
        ModuleNotFoundError: if matplotlib is not installed.
    """
    folders = {int(m[1]): f for f in run.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", f.name))}
    files = {step: folders[step] / COEFF_WEIGHT_NAME for step in sorted(folders)}
    states = {step: read_file(file)[0] for step, file in files.items() if file.exists()}
    if len(states) < 2:
        raise ValueError(
            f"{printable(run)} has {len(states)} checkpoints with a {COEFF_WEIGHT_NAME}, and growth takes two: train "
            "with --checkpointing_steps, and without --checkpoints_total_limit"
        )
    figure = _figure(8.0, 4.5)
    ax = figure.subplots()
    layers = list(states[max(states)])
    for number, key in enumerate(layers):
        norms = [0.0, *(relative_norm(state[key].float()) for state in states.values())]  # a run starts at Delta = 0
        label = " ".join(caption(key).split())
        ax.plot([0, *states], norms, "-" if number < 10 else "--", color=f"C{number % 10}", label=label)
    ax.set_xlabel("optimizer step")
    ax.set_ylabel("||Delta|| / ||I||")
    if len(layers) <= 20:
        ax.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)
    return list(states)


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ModuleNotFoundError(
            "images are drawn by matplotlib, which is not installed: pip install 'coeff_diffusers[plot]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150)
    with whole_file(path) as temporary:
        Path(temporary).write_bytes(data.getvalue())


def caption(key: str) -> str:
    """A layer's path in two lines, without the component."""
    path = key.removesuffix(KEY_SUFFIX).split(".")[1:]
    end = 3 if len(path) > 4 else 1
    return f"{'.'.join(path[:-end])}\n{'.'.join(path[-end:])}"
