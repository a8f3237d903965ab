"""Which trials there are, in which order, and the file that they are written to."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import mean
from time import perf_counter

import torch
from judge import HERE
from methods import ABLATIONS, MAIN, METHODS, MORE, UNTRAINED, Method
from trial import REPORTED, TUNING, Trial, run_trial

RESULTS = HERE / "results"
TUNED_ON = TUNING[:2]
Row = dict[str, str]


@dataclass(frozen=True)
class Stage:
    """Methods by subjects, the subjects outside: a stage that is broken off has compared all methods on some."""

    model: str
    methods: Sequence[Method]
    subjects: Sequence[str]
    seeds: Sequence[int] = (0,)


# What says most comes first.
FULL = [
    Stage("unet", [*UNTRAINED, *MAIN[:5]], REPORTED[:3]),
    Stage("dit", [*UNTRAINED, MAIN[0], MAIN[1], MAIN[4]], REPORTED[:3]),
    Stage("unet", MAIN, REPORTED[:6]),
    Stage("dit", [MAIN[0], MAIN[1], MAIN[4]], REPORTED[:6]),
    Stage("unet", [*UNTRAINED, *MAIN], REPORTED),
    Stage("unet", MORE, REPORTED),
    Stage("unet", ABLATIONS, REPORTED),
    Stage("dit", [*UNTRAINED, *MAIN, *MORE, *ABLATIONS], REPORTED),
    Stage("unet", [*MAIN, *MORE, *ABLATIONS], REPORTED, (1, 2)),
    Stage("dit", [*MAIN, *MORE, *ABLATIONS], REPORTED, (1, 2)),
]


SHORT = [Stage("unet", [METHODS["base model"], MAIN[0], MAIN[1], MAIN[4]], REPORTED[:3])]


# ------------------------------------------------------------------------------------------------------------- rates


def tuning(method: Method, model: str, rows: Sequence[Row]) -> list[Trial]:
    """The trials that choose the method's rate."""
    beside: tuple[float, ...] = ()
    if method.lora_rate_of:
        beside = chosen(METHODS[method.lora_rate_of], model, rows)
    return [Trial(method, model, subject, rates=(rate, *beside)) for rate in method.rates for subject in TUNED_ON]


def chosen(method: Method, model: str, rows: Sequence[Row]) -> tuple[float, ...]:
    """The rates with the lowest mean loss on new backgrounds over the tuning subjects.

    Raises:
        ValueError: if a trial that chooses them has no row.
    """
    by_rates: dict[tuple[float, ...], list[float]] = {}
    for trial in tuning(method, model, rows):
        found = [float(row["loss_background"]) for row in rows if is_of(row, trial)]
        if not found:
            raise ValueError(f"{method.name} on {model} has not been tuned: there is no row of {trial.key}")
        by_rates.setdefault(trial.rates, []).append(found[0])
    return min(by_rates, key=lambda rates: mean(by_rates[rates])) if by_rates else ()


def is_of(row: Row, trial: Trial) -> bool:
    return all(row[name] == value for name, value in trial.key.items())


# ------------------------------------------------------------------------------------------------------------- plan


def plan(stages: Sequence[Stage], rows: Sequence[Row]) -> Iterator[Trial]:
    """All trials of the stages; a method's rate is chosen when it comes first, from `rows`, which may grow."""
    for stage in stages:
        methods = [method for method in stage.methods if stage.model in method.models]
        for method in methods:
            if method.lora_rate_of:
                yield from tuning(METHODS[method.lora_rate_of], stage.model, rows)
            yield from tuning(method, stage.model, rows)
        for seed in stage.seeds:
            for subject in stage.subjects:
                for method in methods:
                    yield Trial(method, stage.model, subject, seed, chosen(method, stage.model, rows))


def run(
    stages: Sequence[Stage],
    file: Path,
    known: Sequence[Row] = (),
    execute: Callable[[Trial], dict[str, float]] = run_trial,
) -> list[Row]:
    """Runs what the file does not have yet, and adds a whole line for each.

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
        start = perf_counter()
        values = execute(trial)
        more = {"seconds": perf_counter() - start, "date": date.today().isoformat(), "torch": torch.__version__}
        row = trial.key | {name: shown(value) for name, value in (values | more).items()}
        append(file, row)
        rows.append(row)
        print(f"{len(rows)}: {', '.join(trial.key.values())}: loss {row.get('loss_background')}", flush=True)
    return rows


def shown(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------------------------------------- file

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


def read(file: Path) -> list[Row]:
    """The whole lines of the file; none if there is no file.

    Raises:
        ValueError: if the file has other columns.
    """
    if not file.exists():
        return []
    text = file.read_text()
    whole = text[: text.rfind("\n") + 1]  # a line that was cut off is run again
    if whole != text:
        file.write_text(whole)
    reader = csv.DictReader(io.StringIO(whole))
    if reader.fieldnames is not None and list(reader.fieldnames) != COLUMNS:
        raise ValueError(f"{file} has the columns {reader.fieldnames}, not {COLUMNS}: name another --csv")
    return list(reader)


def append(file: Path, row: Row) -> None:
    """One write, of a whole line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    if not file.exists() or not file.stat().st_size:
        writer.writeheader()
    writer.writerow(row)
    with open(file, "a") as target:
        target.write(text.getvalue())
        target.flush()
        os.fsync(target.fileno())
