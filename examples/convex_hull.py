r"""What coefficients add to attention, in one layer that can be drawn: outputs leave the convex hull of the values.

    maps_j = softmax(Q_j K_j^T / sqrt(d)),   out_i = (sum_j alpha_ij maps_j) V_i,   alpha = I + Delta

    python examples/convex_hull.py

Queries, keys and values are frozen and random, the values points of a plane; the targets of each head lie outside the
convex hull of its values. Ordinary attention cannot reach them whatever its maps are, for a row of a softmax is an
average: `maps` trains every entry of every map and ends on the hull's edge. `coefficients` trains Delta alone and
reaches them: a head has 8 coefficients, and its three targets in the plane are 6 equations. Writes `convex_hull.png`
and `convex_hull.json` to `outputs/convex_hull`, in some seconds. Needs matplotlib
(`pip install "coeff_diffusers[plot]"`).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coeff_diffusers.functional import mixed_attention

H, T, S, D, E = 8, 3, 7, 4, 2  # heads, queries, keys, their width, the plane that values lie in


class Layer(NamedTuple):
    """What is frozen: (H, T, D), (H, S, D) and (H, S, E); and what each head should answer, (H, T, E)."""

    query: Tensor
    key: Tensor
    value: Tensor
    target: Tensor


def main(args: argparse.Namespace) -> dict[str, Any]:
    layer = make_layer(args.seed)
    logits = layer.query @ layer.key.mT / math.sqrt(D)
    delta, free_logits = torch.zeros(H, H), logits.clone()  # both start as ordinary attention
    runs = {
        "maps": train(lambda: free_logits.softmax(-1) @ layer.value, free_logits, layer.target, args),
        "coefficients": train(lambda: attention(layer, delta), delta, layer.target, args),
    }
    outputs = {
        "frozen": attention(layer, torch.zeros(H, H)),
        "maps": free_logits.detach().softmax(-1) @ layer.value,
        "coefficients": attention(layer, delta.detach()),
    }
    floor = hull_distance(layer.value, layer.target).square().mean().item()
    results = {
        "trained": {"maps": free_logits.numel(), "coefficients": delta.numel()},
        "loss": {name: squared_distance(out, layer.target).item() for name, out in outputs.items()},
        "least that any softmax can have": floor,
        "largest distance from the hull": {
            name: hull_distance(layer.value, out).max().item() for name, out in outputs.items()
        },
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "convex_hull.json").write_text(json.dumps(results, indent=2) + "\n")
    draw(layer, outputs, runs, floor, args.output_dir / "convex_hull.png")
    print(json.dumps(results, indent=2) + f"\nwrote {args.output_dir / 'convex_hull.png'}")
    return results


def make_layer(seed: int) -> Layer:
    """Random frozen inputs, and targets at 1.6 times the radius of the values about their mean."""
    generator = torch.Generator().manual_seed(seed)
    query, key = (2.0 * torch.randn(H, n, D, generator=generator) for n in (T, S))
    value = torch.randn(H, S, E, generator=generator)
    centre = value.mean(1, keepdim=True)
    radius = (value - centre).norm(dim=-1).amax(1)[:, None, None]
    angle = 2 * math.pi * (torch.rand(H, 1, generator=generator) + torch.arange(T) / T)  # (H, T), all around
    return Layer(query, key, value, centre + 1.6 * radius * torch.stack([angle.cos(), angle.sin()], -1))


def attention(layer: Layer, delta: Tensor) -> Tensor:
    """(H, T, E)."""
    return mixed_attention(layer.query[None], layer.key[None], layer.value[None], delta)[0]


def squared_distance(out: Tensor, target: Tensor) -> Tensor:
    return (out - target).square().sum(-1).mean()


def train(answer: Callable[[], Tensor], parameter: Tensor, target: Tensor, args: argparse.Namespace) -> list[float]:
    """Adam on the one parameter of `answer`; returns the losses."""
    parameter.requires_grad_(True)
    optimizer = torch.optim.Adam([parameter], lr=args.learning_rate)
    losses = []
    for _ in range(args.max_train_steps):
        loss = squared_distance(answer(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def hull_distance(value: Tensor, points: Tensor, directions: int = 3600) -> Tensor:
    """(H, T): how far each point lies from the convex hull of its head's values, 0 within.

    By the hull's supporting lines: the largest of u . point - max_s u . value_s over unit vectors u, exact but for
    the angle between two of them.
    """
    angle = 2 * math.pi * torch.arange(directions) / directions
    u = torch.stack([angle.cos(), angle.sin()])  # (E, directions)
    return (points @ u - (value @ u).amax(1, keepdim=True)).amax(-1).clamp(min=0.0)


def draw(layer: Layer, outputs: dict[str, Tensor], runs: dict[str, list[float]], floor: float, path: Path) -> None:
    """Four of the heads with values, hull, targets and outputs; and the loss curves."""
    from matplotlib.figure import Figure

    colours = {"frozen": "0.35", "maps": "tab:orange", "coefficients": "tab:blue"}
    names = {"frozen": "frozen attention", "maps": "every map's entries trained", "coefficients": "Delta trained"}
    figure = Figure(figsize=(11.5, 6.4), layout="constrained")
    plane, curves = figure.subfigures(1, 2, width_ratios=(1.6, 1))
    for head, ax in enumerate(plane.subplots(2, 2).flat):
        ax.fill(*hull(layer.value[head]).T, color="0.9", label="convex hull of the values")
        ax.scatter(*layer.value[head].T, s=18, color="0.6", label="values")
        for name, marker, size in (("frozen", "s", 26), ("maps", "D", 34), ("coefficients", "o", 42)):
            ax.scatter(*outputs[name][head].T, s=size, marker=marker, color=colours[name], label=names[name])
        ax.scatter(*layer.target[head].T, s=90, marker="x", color="black", label="targets")
        ax.set_title(f"head {head}", fontsize=9)
        ax.set_aspect("equal", adjustable="datalim")
        ax.set_xticks([])
        ax.set_yticks([])
    plane.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    ax = curves.subplots()
    for name, losses in runs.items():
        ax.plot(losses, color=colours[name], label=f"{names[name]}: {layer_numbers(name)} numbers")
    ax.axhline(floor, color="black", linestyle="--", linewidth=1, label="least that any softmax can have")
    ax.set_yscale("log")
    ax.set_xlabel("step")
    ax.set_ylabel("squared distance to the targets, mean")
    ax.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def layer_numbers(name: str) -> int:
    return H * H if name == "coefficients" else H * T * S


def hull(points: Tensor) -> Tensor:
    """The corners of the convex hull of (S, 2) points, in order: those that lie farthest in some direction."""
    angle = 2 * math.pi * torch.arange(3600) / 3600
    farthest = (points @ torch.stack([angle.cos(), angle.sin()])).argmax(0)  # (directions,)
    return points[torch.unique_consecutive(farthest)]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_train_steps", type=int, default=1000)
    parser.add_argument("--learning_rate", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/convex_hull"))
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
