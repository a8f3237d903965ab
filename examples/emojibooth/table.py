"""The table and the plots, out of the raw numbers.

python examples/emojibooth/table.py        of results/trials.csv
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev, variance

import sizes
from measures import SCENES
from methods import ABLATIONS, COMPOSITION, DEFAULT, METHODS, Method
from PIL import Image
from plan import BACKGROUNDS, BY_BACKGROUNDS, RESULTS, Row, beyond, chosen, is_of, loss_of, read
from trial import FAMILIES, REPORTED, TUNING, Trial

from coeff_diffusers.commands.sheet import sheet

PAIRS = [
    ("coefficients, SOAP", "coefficients, AdamW"),
    *((f"LoRA, rank {rank} + coefficients", f"LoRA, rank {rank}") for rank in (1, 4, 16)),
    ("coefficients, SOAP", "LoRA, rank 4"),
    ("coefficients, SOAP", "LoRA, rank 1 on values and outputs"),
    ("output mixing, SOAP", "coefficients, SOAP"),
    ("coefficients + output mixing, SOAP", "coefficients, SOAP"),
    ("coefficients + output mixing, SOAP", "LoRA, rank 1"),
    ("coefficients, SOAP", "LoRA-XS, SOAP"),
    *((DEFAULT, name) for name in ("LoRA-XS, SOAP", "TinyLoRA", "FourierFT", "VeRA", "IA3", "OFT")),
    (DEFAULT, "LoRA, rank 4"),
    (DEFAULT, "LoRA, rank 1 on values and outputs"),
    (DEFAULT, "coefficients, SOAP"),
    ("coefficients, SOAP, augmented", "coefficients, SOAP"),
    (f"{DEFAULT}, augmented", DEFAULT),
    ("LoRA, rank 4, augmented", "LoRA, rank 4"),
    (f"{DEFAULT}, augmented", "LoRA, rank 4, augmented"),
    *((method.name, DEFAULT) for method in COMPOSITION),
    *((method.name, "coefficients, SOAP") for method in ABLATIONS),
]
DRAWN = [  # in the sheets of images
    *("true scenes", "base model", "base model, prompt of the likest glyph"),
    *(DEFAULT, f"{DEFAULT}, augmented", "coefficients, SOAP, self-attention", "coefficients, SOAP, cross-attention"),
    *("LoRA, rank 1 on values and outputs", "IA3", "LoRA, rank 4", "LoRA, rank 4, augmented"),
    *("LoRA, rank 4 + coefficients", "full fine-tuning"),
]
COMPARED = ("loss, new backgrounds", "PSNR, new backgrounds", "PSNR, new sizes and places", "recognised", "drift")
Runs = dict[str, dict[str, Row]]  # of a method: subject -> seed -> row
KINDS = tuple(SCENES)
MEASURES = {  # heading -> columns that it is the mean of, and digits after the point
    "loss, new backgrounds": (["loss_background"], 3),
    "loss, new sizes and places": (["loss_size", "loss_place"], 3),
    "likeness": (["likeness_background"], 3),
    "PSNR, new backgrounds": (["psnr_background"], 1),
    "PSNR, new sizes and places": (["psnr_size", "psnr_place"], 1),
    "recognised": ([f"recognised_{kind}" for kind in KINDS], 2),
    "colour": ([f"colour_{kind}" for kind in KINDS], 2),
    "size": (["size_size"], 2),
    "place": (["place_place"], 2),
    "drift": (["drift"], 1),
    "others recognised": (["unrelated_recognised"], 2),
    "between seeds": (["diversity"], 1),
}


def of_method(rows: Sequence[Row], method: Method, model: str, kinds: Sequence[str] = KINDS) -> Runs:
    """At the rates that tuning chose by the loss on these kinds of scenes. Of trials that are there twice, one."""
    try:
        rates = chosen(method, model, rows, kinds)
    except ValueError:
        return {}
    found: Runs = {}
    for row in rows:
        trial = Trial(method, model, row["subject"], int(row["seed"]), rates)
        if row["subject"] in REPORTED and is_of(row, trial):
            found.setdefault(row["subject"], {})[row["seed"]] = row
    return found


def value(row: Row, columns: Sequence[str]) -> float | None:
    """The mean of the columns; `None` where one is empty."""
    return mean(float(row[column]) for column in columns) if all(row[column] for column in columns) else None


def by_subject(of_subjects: Runs, columns: Sequence[str]) -> dict[str, float]:
    """Subject -> the mean over its seeds."""
    found = {subject: [value(row, columns) for row in each.values()] for subject, each in of_subjects.items()}
    return {subject: mean(values) for subject, values in found.items() if values and None not in values}  # type: ignore


def with_error(values: Sequence[float], digits: int) -> str:
    """Mean and standard error over subjects."""
    if not values:
        return ""
    error = f" ± {stdev(values) / math.sqrt(len(values)):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{error}"


def markdown(rows: Sequence[Row]) -> str:
    parts = []
    for model in FAMILIES:
        found = {name: of_method(rows, method, model) for name, method in METHODS.items()}
        found = {name: each for name, each in found.items() if each}
        if found:
            parts += [f"## {model}", quality(found), cost(found), paired(found), between_seeds(found)]
            parts.append(edges(rows, model))
            other = {each.name: of_method(rows, each, model, BACKGROUNDS) for each in BY_BACKGROUNDS}
            if other := {name: each for name, each in other.items() if each}:
                title = f"### {model}, at the rates with the lowest loss on new backgrounds alone"
                parts += [title, quality(other), cost(other), paired(other)]
    return "\n\n".join(filter(None, parts)) + "\n"


def quality(found: dict[str, Runs]) -> str:
    lines = [f"| | runs, subjects | {' | '.join(MEASURES)} |", "|---|---|" + "---|" * len(MEASURES)]
    for name, of_subjects in found.items():
        values = [list(by_subject(of_subjects, columns).values()) for columns, _ in MEASURES.values()]
        cells = [with_error(each, digits) for each, (_, digits) in zip(values, MEASURES.values())]
        lines.append(f"| {name} | {runs(of_subjects)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def runs(of_subjects: Runs) -> str:
    count = sum(map(len, of_subjects.values()))
    return f"{count}, {len(of_subjects)}"


def cost(found: dict[str, Runs]) -> str:
    lines = ["| | rates | trainable parameters | file, KB | step, ms | memory, MB |", "|---|---|---|---|---|---|"]
    for name, of_subjects in found.items():
        rows = [row for each in of_subjects.values() for row in each.values()]
        if rows[0]["rates"]:
            least = min(float(row["step_seconds"]) for row in rows) * 1000
            lines.append(
                f"| {name} | {rows[0]['rates']} | {int(rows[0]['parameters']):,} | "
                f"{int(rows[0]['bytes']) / 1000:,.0f} | {least:.0f} | {float(rows[0]['memory_mb']):.0f} |"
            )
    return "\n".join(lines)


def between_seeds(found: dict[str, Runs]) -> str:
    """How far runs of one subject that differ in the seed alone lie apart."""
    lines = [f"| SD between seeds of training | {' | '.join(COMPARED)} |", "|---|" + "---|" * len(COMPARED)]
    for name, of_subjects in found.items():
        several = [[*rows.values()] for rows in of_subjects.values() if len(rows) > 1]
        if several:
            cells = []
            for columns, digits in (MEASURES[each] for each in COMPARED):
                spreads = [variance(mean(float(row[each]) for each in columns) for row in rows) for rows in several]
                cells.append(f"{math.sqrt(mean(spreads)):.{digits}f}")
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def edges(rows: Sequence[Row], model: str) -> str:
    """What tuning would find past the grid of rates, where the best lies at its edge."""
    lines = ["| best rate at the grid's edge | it | loss, fox | the next | loss, fox |", "|---|---|---|---|---|"]
    for name, method in METHODS.items():
        if past := beyond(method, model, rows):
            trials = [Trial(method, model, TUNING[0], rates=each) for each in (chosen(method, model, rows), past)]
            losses = [loss_of(trial, rows) for trial in trials]
            if None not in losses:
                cells = [f"{trial.key['rates']} | {loss:.3f}" for trial, loss in zip(trials, losses)]
                lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


# ------------------------------------------------------------------------------------------------------------ pairs


def paired(found: dict[str, Runs]) -> str:
    """Differences over the same subjects and seeds, with a sign-flip test."""
    lines = [f"| first less second | pairs, subjects | {' | '.join(COMPARED)} |", "|---|---|" + "---|" * len(COMPARED)]
    for first, second in PAIRS:
        if first in found and second in found:
            cells = [difference(found[first], found[second], MEASURES[name]) for name in COMPARED]
            lines.append(
                f"| {first}; {second} | {runs(of_same_seeds(found[first], found[second])[0])} | {' | '.join(cells)} |"
            )
    return "\n".join(lines) if len(lines) > 2 else ""


def difference(first: Runs, second: Runs, measure: tuple[list[str], int]) -> str:
    columns, digits = measure
    one, other = (by_subject(each, columns) for each in of_same_seeds(first, second))
    values = [one[subject] - other[subject] for subject in one if subject in other]
    return f"{with_error(values, digits)}, p = {sign_flip(values):.3f}" if values else ""


def of_same_seeds(first: Runs, second: Runs) -> tuple[Runs, Runs]:
    """The runs that both have."""
    shared = {subject: first[subject].keys() & second[subject].keys() for subject in first if subject in second}
    one, other = (
        {name: {s: each[name][s] for s in seeds} for name, seeds in shared.items()} for each in (first, second)
    )
    return one, other


def sign_flip(values: Sequence[float]) -> float:
    """Two-sided exact p: the share of sign patterns whose mean is as far from zero as that of `values`."""
    reached = abs(sum(values)) - 1e-12
    patterns = itertools.product((-1, 1), repeat=len(values))
    return mean(abs(sum(sign * value for sign, value in zip(signs, values))) >= reached for signs in patterns)


# ------------------------------------------------------------------------------------------------------------ plots


def plot(rows: Sequence[Row], horizontal: str, label: str, path: Path) -> None:
    """PSNR on new backgrounds against a column, a panel for each model."""
    from matplotlib.figure import Figure

    models = [model for model in FAMILIES if any(row["model"] == model and row["drift"] for row in rows)]
    if not models:  # tuning alone
        return
    figure = Figure(figsize=(5 * len(models) + 3, 5), layout="constrained")
    style = {name: {"marker": "osD^vPX"[n % 7], "color": f"C{n % 10}"} for n, name in enumerate(METHODS)}
    for ax, model in zip(figure.subplots(1, len(models), squeeze=False).flat, models):
        for name, method in METHODS.items():
            of_subjects = of_method(rows, method, model) if method.rates else {}
            if not of_subjects:
                continue
            x = list(by_subject(of_subjects, [horizontal]).values())
            y = list(by_subject(of_subjects, ["psnr_background"]).values())
            error = stdev(y) / math.sqrt(len(y)) if len(y) > 1 else 0.0
            ax.errorbar(mean(x), mean(y), error, markersize=5, label=name, **style[name])
        ax.set(title=model, xlabel=label, ylabel="PSNR to the true scene, new backgrounds (dB)")
        if horizontal == "parameters":
            ax.set_xscale("log")
        ax.margins(x=0.1, y=0.1)
    labels = {name: handle for ax in figure.axes for handle, name in zip(*ax.get_legend_handles_labels())}
    figure.set_figheight(max(5.0, 0.17 * len(labels)))
    figure.legend(labels.values(), labels, loc="outside right center", fontsize=7)
    figure.savefig(path, dpi=110)


def draw_sheet(rows: Sequence[Row], model: str, subject: str, folder: Path) -> Image.Image | None:
    """What methods paint of a subject, of the images that trials left in `folder`; `None` if some ran elsewhere."""
    shown = []
    for name in DRAWN:
        try:
            trial = Trial(METHODS[name], model, subject, rates=chosen(METHODS[name], model, rows))
        except ValueError:  # not tuned
            continue
        path = folder / f"{trial.slug}.png"
        if path.exists():
            strip = Image.open(path)
            cells = [strip.crop((x, 0, x + strip.height, strip.height)) for x in range(0, strip.width, strip.height)]
            shown.append((name, cells, []))
        elif any(is_of(row, trial) for row in rows):
            return None
    return sheet(shown, title=f"{model}: {subject}", cell=96) if shown else None


def write_report(rows: Sequence[Row], output: Path, images: Path) -> None:
    """`table.md`, `parameters.png`, `drift.png`, and a sheet for each model whose images are all in `images`."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "table.md").write_text(
        markdown(rows) + "\n## Parameters on models of real size\n\n" + sizes.real_sizes()
    )
    plot(rows, "parameters", "trainable parameters", output / "parameters.png")
    plot(rows, "drift", "drift: mean change of unrelated images, of 255", output / "drift.png")
    for model in FAMILIES:
        page = draw_sheet(rows, model, REPORTED[0], images)
        if page is not None:
            page.save(output / f"{model}.png")
        elif any(row["model"] == model and row["subject"] == REPORTED[0] for row in rows):
            print(f"{output / f'{model}.png'} is left as it is: not all of its images are in {images}")


if __name__ == "__main__":
    write_report(read(RESULTS / "trials.csv"), RESULTS, Path("outputs/emojibooth/images"))
