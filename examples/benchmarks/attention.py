"""mixed_attention against attention that does not mix: time and memory, as ratios within one run.

    make bench            or            python examples/benchmarks/attention.py --repeats 5

Prints a table and writes it to `outputs/benchmarks/attention.md`. Times are medians; calls of both kinds alternate, so
that a change of the machine's load meets both. With `--threads 1` it is the thread's processor time that counts, which
other processes hardly disturb; several threads need an idle machine. Memory is the peak above inputs and outputs, of a
process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import report
import torch
import torch.nn.functional as F
from torch import Tensor

from coeff_diffusers import mixed_attention

SHAPES = [  # B, H, T, S, D
    (1, 8, 4096, 4096, 40),  # SD 1.5, 512 px, first level
    (1, 10, 4096, 4096, 64),  # SDXL, 1024 px, second level
    (2, 8, 1024, 1024, 80),  # SD 1.5, second level
    (2, 20, 1024, 1024, 64),  # SDXL, third level
    (1, 24, 1536, 1536, 128),  # FLUX, 512 px and 512 tokens
    (2, 8, 4096, 77, 40),  # SD 1.5, text
]


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    rows = [(shape, *time_ratios(shape, args.repeats), peak_memory(shape, args.threads)) for shape in SHAPES]
    report.write(table(rows, args), args.output)


def time_ratios(shape: tuple[int, ...], repeats: int) -> tuple[float, float]:
    """Time of mixed_attention by that of scaled_dot_product_attention: forward, and forward with backward."""
    inputs = make_inputs(shape)

    def forward(attention: Callable[..., Tensor]) -> None:
        with torch.no_grad():
            attention(*inputs)

    def training(attention: Callable[..., Tensor]) -> None:
        torch.autograd.grad(attention(*inputs).sum(), inputs, allow_unused=True)

    return ratio(forward, repeats), ratio(training, repeats)


def ratio(run: Callable[[Callable[..., Tensor]], None], repeats: int) -> float:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[Callable[..., Tensor], list[float]] = {unmixed: [], mixed_attention: []}
    for attempt in range(repeats + 1):
        for attention, seconds in times.items():
            start = clock()
            run(attention)
            if attempt:  # the first call of each warms up
                seconds.append(clock() - start)
    return statistics.median(times[mixed_attention]) / statistics.median(times[unmixed])


def unmixed(query: Tensor, key: Tensor, value: Tensor, coeff: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value)


def make_inputs(shape: tuple[int, ...]) -> list[Tensor]:
    B, H, T, S, D = shape
    generator = torch.Generator().manual_seed(0)
    qkv = [torch.randn(B, n, H, D, generator=generator).transpose(1, 2) for n in (T, S, S)]  # as models lay it out
    return [x.requires_grad_() for x in (*qkv, torch.randn(H, H, generator=generator))]


def peak_memory(shape: tuple[int, ...], threads: int) -> dict[str, float]:
    """MB above inputs, outputs and gradients, forward and training, each measured in a fresh process."""
    peaks = {}
    for kind in ("forward", "training"):
        command = [sys.executable, __file__, "--measure", kind, json.dumps(shape), "--threads", str(threads)]
        peaks[kind] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return peaks


def measure(kind: str, shape: tuple[int, ...], threads: int) -> None:
    """In a process of its own: the peak of resident memory over a call, less what the call returns."""
    torch.set_num_threads(threads)
    small = make_inputs((1, shape[1], 64, 64, shape[4]))
    torch.autograd.grad(mixed_attention(*small).sum(), small)  # libraries are loaded, buffers of theirs are there
    inputs = make_inputs(shape)

    def call() -> list[Tensor]:
        with torch.set_grad_enabled(kind == "training"):
            results = [mixed_attention(*inputs)]
            if kind == "training":
                results += torch.autograd.grad(results[0], inputs, grad_outputs=torch.ones_like(results[0]))
                results.append(torch.empty_like(results[0]))  # stands for the ones
        return results

    peak, results = report.peak_memory(call)
    print(peak - sum(x.numel() * x.element_size() for x in results) / 2**20)


def table(rows: list, args: argparse.Namespace) -> str:
    lines = [
        f"mixed_attention by scaled_dot_product_attention, float32, medians of {args.repeats}; {report.machine()}",
        "",
        "| B, H, T, S, D | forward | forward + backward | MB extra, forward | MB extra, training |",
        "|---|---|---|---|---|",
    ]
    for shape, forward, training, memory in rows:
        shown = ", ".join(map(str, shape))
        lines.append(
            f"| {shown} | {forward:.2f} | {training:.2f} | {memory['forward']:.0f} | {memory['training']:.0f} |"
        )
    means = [statistics.mean(row[column] for row in rows) for column in (1, 2)]
    lines.append(f"| mean | {means[0]:.2f} | {means[1]:.2f} | | |")
    return "\n".join(lines) + "\n"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/attention.md"))
    parser.add_argument("--measure", nargs=2, metavar=("KIND", "SHAPE"), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_args()
    if arguments.measure:
        measure(arguments.measure[0], tuple(json.loads(arguments.measure[1])), arguments.threads)
    else:
        main(arguments)
