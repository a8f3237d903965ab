"""Draws mixing.svg of docs/how_it_works.md: four heads' maps, alpha, and the four maps that the heads then have.

    python docs/site/drawing.py

The maps are softmaxes of fixed random scores, and each mixed map is the sum that alpha says.
"""

from __future__ import annotations

import math
import random
from pathlib import Path

FILE = Path(__file__).with_name("mixing.svg")
HEADS, TOKENS = 4, 6
ALPHA = [[1.0, 0.0, 0.4, 0.0], [-0.6, 1.3, 0.0, 0.5], [0.0, 0.0, 1.0, 0.0], [0.3, -0.5, 0.0, 0.8]]
SIDE, ROW, TOP = 66, 84, 92  # of a map, from one to the next, and above the first, in pixels
Matrix = list[list[float]]


def softmax(scores: list[float]) -> list[float]:
    exponentials = [math.exp(score) for score in scores]
    return [each / sum(exponentials) for each in exponentials]


def attention_map(numbers: random.Random) -> Matrix:
    return [softmax([numbers.gauss(0, 1.6) for _ in range(TOKENS)]) for _ in range(TOKENS)]


def mixed(row: list[float], maps: list[Matrix]) -> Matrix:
    """sum_j alpha_ij A_j, of one row i of alpha."""
    return [[sum(alpha * one[t][s] for alpha, one in zip(row, maps)) for s in range(TOKENS)] for t in range(TOKENS)]


def colour(value: float) -> str:
    """White at 0, red up to 1 and beyond, blue below 0."""
    strength = min(abs(value), 1.0) ** 0.7
    faded = round(255 * (1 - strength))
    return f"rgb(255,{faded},{faded})" if value >= 0 else f"rgb({faded},{faded},255)"


def text(x: float, y: float, words: str, size: int = 15, anchor: str = "middle", weight: str = "normal") -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" font-weight="{weight}">{words}</text>'


def square(x: float, y: float, side: float, fill: str, stroke: str = "none") -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{side:g}" height="{side:g}" fill="{fill}" stroke="{stroke}"/>'


def drawn_map(values: Matrix, x: float, y: float) -> list[str]:
    cell = SIDE / TOKENS
    cells = [
        square(x + s * cell, y + t * cell, cell, colour(values[t][s])) for t in range(TOKENS) for s in range(TOKENS)
    ]
    return [*cells, square(x, y, SIDE, "none", "#888")]


def index(letter: str, number: str) -> str:
    return f'<tspan font-style="italic">{letter}</tspan><tspan dy="4" font-size="11">{number}</tspan>'


def drawing() -> str:
    numbers = random.Random(3)
    maps = [attention_map(numbers) for _ in range(HEADS)]
    parts = [
        text(102, 30, "each head's own map", weight="bold"),
        text(95, 52, "softmax(Q K / √d)", 13),
        text(372, 30, "α = I + Δ", weight="bold"),
        text(372, 52, "all that is trained: H × H a layer", 13),
        text(655, 30, "the map that it uses", weight="bold"),
        text(655, 52, "Σ α A, negative or above 1", 13),
        text(820, 30, "output", weight="bold"),
    ]
    for i, row in enumerate(ALPHA):
        y = TOP + i * ROW
        middle = y + SIDE / 2
        parts += [text(30, middle + 5, index("A", str(i + 1))), *drawn_map(maps[i], 62, y)]
        for j, alpha in enumerate(row):
            x = 204 + j * ROW
            parts.append(square(x, y - 9, ROW, colour(alpha * 0.6), "#888"))
            parts.append(text(x + ROW / 2, middle + 5, f"{alpha:g}".replace("-", "−"), 16))
        parts += [text(580, middle + 5, "→", 20), *drawn_map(mixed(row, maps), 622, y)]
        parts.append(text(776, middle + 5, f"× {index('V', str(i + 1))}", 15, "end"))
        parts.append(text(790, middle + 5, f"→ {index('out', str(i + 1))}", 15, "start"))
    for j in range(HEADS):
        parts.append(text(204 + (j + 0.5) * ROW, TOP - 17, index("A", str(j + 1)), 13))
    parts.append(text(166, TOP + 2 * ROW - 4, "→", 20))
    legend = TOP + HEADS * ROW + 22
    for k, value in enumerate((-0.5, 0.0, 0.5, 1.0)):
        parts.append(square(622 + k * 64, legend - 12, 14, colour(value), "#888"))
        parts.append(text(641 + k * 64, legend, f"{value:g}".replace("-", "−"), 13, "start"))
    parts.append(text(62, legend, "Δ = 0 is the base model: each head then uses its own map alone.", 14, "start"))
    height = legend + 20
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 880 {height}" width="880" height="{height}" '
        'font-family="sans-serif" fill="#222">\n'
        f'<rect width="880" height="{height}" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


if __name__ == "__main__":
    FILE.write_text(drawing(), encoding="utf-8")
    print(f"wrote {FILE}")
