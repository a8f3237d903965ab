"""EmojiBooth: personalisation methods on the embedded models, measured against images that are known to be right.

    python examples/emojibooth --short        5 minutes on two cores: 3 subjects, 3 methods and the base model
    python examples/emojibooth                everything: hours; goes on where it was

Each trial that is done is a line of trials.csv; table.py makes the table and the plots of them.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from coeff_diffusers.console import hush

hush()  # before diffusers loads its pipelines
from plan import FULL, RESULTS, SHORT, read, run  # noqa: E402
from table import write_report  # noqa: E402
from trial import FAMILIES, TUNING, run_trial  # noqa: E402

from coeff_diffusers.training.errors import Stopped  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="3 subjects, 3 methods, at the rates of results/")
    parser.add_argument("--output_dir", type=Path, help="of trials.csv and the report; results/ if not given")
    parser.add_argument(
        "--model", choices=FAMILIES, help="this one alone; a process for each may write into one file at a time"
    )
    args = parser.parse_args()
    output = args.output_dir or (Path("outputs/emojibooth") if args.short else RESULTS)
    known = [row for row in read(RESULTS / "trials.csv") if row["subject"] in TUNING] if args.short else []
    execute = partial(run_trial, folder=Path("outputs/emojibooth/images"))
    stages = [each for each in (SHORT if args.short else FULL) if args.model in (None, each.model)]
    if not stages:
        parser.error(f"--short has no trials on {args.model}: leave out one of the two")
    try:
        rows = run(stages, output / "trials.csv", known, execute)
    except Stopped:  # its checkpoint was in a temporary folder
        parser.exit(1, "stopped: the same command goes on, from the start of the trial that it was in\n")
    write_report(rows, output, Path("outputs/emojibooth/images"))
    print(f"{output / 'table.md'}, and plots beside it")


if __name__ == "__main__":
    main()
