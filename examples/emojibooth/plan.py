"""Which trials there are, in which order, and the file that they are written to."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import geometric_mean, mean
from time import perf_counter

import torch
from judge import HERE
from measures import SCENES
from methods import ABLATIONS, COMPOSITION, DEFAULT, MAIN, METHODS, MORE, UNTRAINED, WITH_MORE, Method
from trial import FAMILIES, REPORTED, TUNING, Trial, run_trial

RESULTS = HERE / "results"
Row = dict[str, str]
COLUMNS = [
    *("method", "model", "subject", "seed", "rates", "steps"),
    *("parameters", "bytes", "step_seconds", "memory_mb", "train_loss"),
    *(f"loss_{kind}" for kind in ("background", "size", "place")),
    *(
        f"{name}_{kind}"
        for kind in ("background", "size", "place")
        for name in ("likeness", "psnr", "recognised", "colour", "size", "place")
    ),
    *("diversity", "drift", "unrelated_recognised", "seconds", "date", "torch"),
]


@dataclass(frozen=True)
class Stage:
    """Methods by subjects, the subjects outside: a stage that is broken off has compared all methods on some.

    Args:
        model: of `trial.FAMILIES`.
        methods: those that can be put on the model are run.
        subjects: that are reported.
        seeds: of training.
        tuned_on: subjects that choose the rates.
        kinds: of scenes, whose loss chooses the rates.
        beyond: nothing is reported: where the best rate is the last of its grid, the next one is tried as well.
    """

    model: str
    methods: Sequence[Method]
    subjects: Sequence[str] = REPORTED
    seeds: Sequence[int] = (0,)
    tuned_on: Sequence[str] = TUNING
    kinds: Sequence[str] = tuple(SCENES)
    beyond: bool = False


# What says most comes first.
ONE = TUNING[:1]
# Sizes and places favour low rates, for methods without augmentation hardly learn them: does one win by its rate?
BACKGROUNDS = ("background",)
BY_BACKGROUNDS = [each for each in [*MAIN, MORE[0]] if not each.lora_rate_of]
FULL = [
    Stage("unet", [*UNTRAINED, *MAIN, *WITH_MORE]),
    Stage("dit", [*UNTRAINED, *MAIN[:3], *WITH_MORE]),
    Stage("unet", [*MORE, *ABLATIONS]),
    Stage("unet", BY_BACKGROUNDS, kinds=BACKGROUNDS),
    *(Stage(model, list(METHODS.values()), tuned_on=ONE, beyond=True) for model in FAMILIES),
    Stage("unet", [*MAIN, *WITH_MORE, *MORE, *ABLATIONS], seeds=(1, 2)),
    Stage("unet", COMPOSITION, seeds=(0, 1, 2)),
    Stage("dit", [*MAIN[:3], *WITH_MORE], seeds=(1, 2)),
    Stage("dit", [*MAIN[3:], *COMPOSITION, *MORE, *ABLATIONS]),
]
SHORTLY = ["true scenes", "base model", DEFAULT, "LoRA, rank 4", "LoRA, rank 4 + coefficients"]
SHORT = [Stage("unet", [METHODS[name] for name in SHORTLY], REPORTED[:3], tuned_on=())]


# ------------------------------------------------------------------------------------------------------------- rates


def grid(method: Method, model: str, rows: Sequence[Row]) -> list[tuple[float, ...]]:
    """The rates that are tried; with that of the LoRA where it has been chosen for the LoRA alone."""
    if method.trained_as:
        return grid(METHODS[method.trained_as], model, rows)
    beside = chosen(METHODS[method.lora_rate_of], model, rows) if method.lora_rate_of else ()
    return [(rate, *beside) for rate in method.rates]


def chosen(method: Method, model: str, rows: Sequence[Row], kinds: Sequence[str] = tuple(SCENES)) -> tuple[float, ...]:
    """The rates with the lowest loss, over the tuning subjects that have seen all of them.

    It is the geometric mean over the kinds of scenes, in which a tenth off each counts alike: the plain mean would be
    that of sizes and places, which no method without augmentation learns.

    Raises:
        ValueError: if there is no such subject.
    """
    if method.trained_as:
        return chosen(METHODS[method.trained_as], model, rows, kinds)
    rates = grid(method, model, rows)
    trials = [[Trial(method, model, subject, rates=each) for each in rates] for subject in TUNING]
    found = [[loss_of(trial, rows, kinds) for trial in of_subject] for of_subject in trials]
    whole = [losses for losses in found if None not in losses]
    if rates and not whole:
        raise ValueError(f"{method.name} on {model} has not been tuned: not all of {rates} were tried on a subject")
    means = [mean(losses) for losses in zip(*whole)]
    return rates[means.index(min(means))] if rates else ()


def beyond(method: Method, model: str, rows: Sequence[Row]) -> tuple[float, ...] | None:
    """The rates a factor of two past the grid, if the best are at the grid's edge; `None` otherwise, or untuned."""
    if method.trained_as:
        return None
    try:
        rates = chosen(method, model, rows)
    except ValueError:
        return None
    factor = {method.rates[0]: 0.5, method.rates[-1]: 2.0}.get(rates[0]) if rates else None
    return (rates[0] * factor, *rates[1:]) if factor else None


def loss_of(trial: Trial, rows: Sequence[Row], kinds: Sequence[str] = tuple(SCENES)) -> float | None:
    """Geometric mean of the losses on the kinds of scenes; `None` without a row."""
    found = (geometric_mean(float(row[f"loss_{kind}"]) for kind in kinds) for row in rows if is_of(row, trial))
    return next(found, None)


def is_of(row: Row, trial: Trial) -> bool:
    return all(row[name] == value for name, value in trial.key.items())


# ------------------------------------------------------------------------------------------------------------- plan


def plan(stages: Sequence[Stage], rows: Sequence[Row]) -> Iterator[Trial]:
    """All trials of the stages; rates are chosen from `rows`, which may grow meanwhile."""
    for stage in stages:
        methods = [method for method in stage.methods if stage.model in method.models]
        if stage.beyond:
            trained = [(method, beyond(method, stage.model, rows)) for method in methods]
            for subject in stage.tuned_on:
                yield from (Trial(method, stage.model, subject, rates=rates) for method, rates in trained if rates)
            continue
        for method in dict.fromkeys(METHODS.get(each.trained_as or "", each) for each in methods):
            for subject in stage.tuned_on:
                if method.lora_rate_of:
                    alone = METHODS[method.lora_rate_of]
                    yield from (
                        Trial(alone, stage.model, subject, rates=each) for each in grid(alone, stage.model, rows)
                    )
                yield from (
                    Trial(method, stage.model, subject, rates=each) for each in grid(method, stage.model, rows)
                )
        for seed in stage.seeds:
            for subject in stage.subjects:
                for method in methods:
                    yield Trial(method, stage.model, subject, seed, chosen(method, stage.model, rows, stage.kinds))


def run(
    stages: Sequence[Stage],
    file: Path,
    known: Sequence[Row] = (),
    execute: Callable[[Trial], dict[str, float]] = run_trial,
) -> list[Row]:
    """Runs what the file does not have yet, and adds a whole line for each. Others may write into it meanwhile.

    Args:
        stages: of trials.
        file: CSV; what it has is not run again.
        known: rows of another file, of tuning.
        execute: trial -> column -> value.
    """
    rows = [*known, *read(file)]
    for trial in plan(stages, rows):
        if any(is_of(row, trial) for row in rows):
            continue
        rows[len(known) :] = read(file)  # with what other processes have added
        if any(is_of(row, trial) for row in rows):
            continue
        start = perf_counter()
        values = execute(trial)
        more = {"seconds": perf_counter() - start, "date": date.today().isoformat(), "torch": torch.__version__}
        row = dict.fromkeys(COLUMNS, "") | trial.key | {name: shown(value) for name, value in (values | more).items()}
        append(file, row)
        rows.append(row)
        print(f"{len(rows)}: {', '.join(trial.key.values())}: loss {row['loss_background']}", flush=True)
    return rows


def shown(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------------------------------------- file


def read(file: Path) -> list[Row]:
    """The whole lines of the file; none if there is no file. One that was cut off is run again.

    Raises:
        ValueError: if the file has other columns.
    """
    if not file.exists():
        return []
    text = file.read_text()
    # line by line, for one that was cut off within quotes would take the next with it
    lines = [next(csv.reader([line])) for line in text[: text.rfind("\n") + 1].split("\n") if line]
    if lines and lines[0] != COLUMNS:
        raise ValueError(f"{file} has the columns {lines[0]}, not {COLUMNS}: name another --output_dir")
    return [dict(zip(COLUMNS, values)) for values in lines[1:] if len(values) == len(COLUMNS)]


def append(file: Path, row: Row) -> None:
    """One write, of a whole line, below one that was cut off."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    there = file.read_text() if file.exists() else ""
    if not there:
        writer.writeheader()
    elif not there.endswith("\n"):
        text.write("\n")
    writer.writerow(row)
    with open(file, "a") as target:
        target.write(text.getvalue())
        target.flush()
        os.fsync(target.fileno())
