"""Eight subjects trained at once, against one after the other.

    python examples/benchmarks/many_subjects.py

The embedded model, float32, training/train_dreambooth.py with the same flags. Each way is a process of its own.
Seconds are for one optimizer step of every subject, medians over the steps but the first; memory is what the process's
resident memory rises by in training at the most, on Linux.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
import yaml
from report import machine, peak_memory, write

EXAMPLES = Path(__file__).parents[1]
SUBJECTS = ["fox face", "panda face", "koala face", "rabbit face", "tiger face", "owl", "octopus", "rocket"]
WAYS = ("at once", "one after the other")


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    lines = [
        f"{len(SUBJECTS)} subjects on the embedded model; {machine()}",
        "",
        "| images of each subject a step | way | seconds | ratio | MB |",
        "|---|---|---|---|---|",
    ]
    for batch in args.batch_sizes:
        results = {way: run(way, batch, args) for way in WAYS}
        for way, r in results.items():
            ratio = r["seconds"] / results["one after the other"]["seconds"]
            lines.append(f"| {batch} | {way} | {r['seconds']:.2f} | {ratio:.2f} | {r['memory']:.0f} |")
    write("\n".join(lines) + "\n", args.output)


def run(way: str, batch: int, args: argparse.Namespace) -> dict[str, float]:
    """Trains in a process of its own."""
    numbers = [str(number) for number in (batch, args.max_train_steps, args.threads)]
    command = [sys.executable, __file__, "--measure", way, *numbers]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(way: str, batch: int, steps: int) -> dict[str, float]:
    sys.path += [str(EXAMPLES)]
    import train_subjects

    from coeff_diffusers.training import DreamBoothRun, parse_settings

    times: list[float] = []
    memory: list[float] = []

    def train(flags: list[str]) -> None:
        run = DreamBoothRun(parse_settings(flags))
        run.load_model()
        run.add_adapters()
        run.encode_prompts()
        rise, _ = peak_memory(lambda: times.extend(time.perf_counter() for _ in run.steps()))
        memory.append(rise)
        run.finish()

    with tempfile.TemporaryDirectory() as folder:
        settings = argparse.Namespace(output_dir=Path(folder), max_train_steps=steps, train_batch_size=batch, seed=0)
        file = train_subjects.write_subjects(SUBJECTS, Path(folder))
        flags = train_subjects.training_flags(file, settings)
        if way == "at once":
            train(flags)
        else:
            for entry in yaml.safe_load(file.read_text()):
                train(alone(flags, file, entry))
    runs = [times[start : start + steps] for start in range(0, len(times), steps)]
    seconds = sum(statistics.median(after - before for before, after in pairwise(run)) for run in runs)
    return {"seconds": seconds, "memory": max(memory)}


def alone(flags: list[str], file: Path, entry: dict[str, str]) -> list[str]:
    """The flags of the run of one subject."""
    values = dict(zip(flags[::2], flags[1::2]))
    del values["--subjects"]
    values |= {
        "--instance_data_dir": str(file.parent / entry["images"]),
        "--instance_prompt": entry["prompt"],
        "--caption_column": entry["caption_column"],
        "--output_dir": str(file.parent / "alone" / entry["name"]),
    }
    return [text for pair in values.items() for text in pair]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_train_steps", type=int, default=15)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/many_subjects.md"))
    parser.add_argument("--measure", nargs=4, metavar=("WAY", "BATCH", "STEPS", "THREADS"), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_args()
    if arguments.measure:
        way, *numbers = arguments.measure
        batch, steps, threads = map(int, numbers)
        torch.set_num_threads(threads)
        print(json.dumps(measure(way, batch, steps)))
    else:
        main(arguments)
