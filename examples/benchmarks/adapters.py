"""Many adapters on one model: a subject per image in one batch, and what a thousand resident adapters cost.

    python examples/benchmarks/adapters.py --repeats 5

Prints its tables and writes them to `outputs/benchmarks/adapters.md`. Times are medians; the ways that are compared
alternate within one run, so that a change of the machine's load meets all. Coefficients are random, none is trained.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from report import current_memory, machine, write
from torch import nn

from coeff_diffusers import (
    add_coeff_adapter,
    coeff_disabled,
    coeff_parameters,
    coeff_per_sample,
    delete_coeff_adapters,
    load_coeff_weights,
    save_coeff_weights,
    set_coeff_adapters,
)
from coeff_diffusers.checkpoint import coeff_state_dict

MODEL = Path(__file__).parents[1] / "emoji" / "model"
IMAGES = 8
SD15 = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
}
SDXL_NARROW = {  # all of SDXL's blocks, layers and head counts; channels are 4 a head instead of 64
    "block_out_channels": (20, 40, 80),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 16,
    "norm_num_groups": 4,
    "use_linear_projection": True,
}


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    text = f"Many adapters, float32, medians of {args.repeats}; {machine()}\n\n"
    resident = resident_adapters(args.adapters)  # first, while no freed memory hides what it takes
    batches = [embedded_model(args.repeats)] + ([] if args.skip_sd15 else [sd15_unet(args.repeats)])
    text += batch_table(batches) + "\n" + resident_table(resident)
    write(text, args.output)


def embedded_model(repeats: int) -> tuple[str, dict[str, float]]:
    """Whole calls of the pipeline, with classifier-free guidance."""
    pipe = StableDiffusionPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "guidance_scale": 2.5, "output_type": "latent"}
    what = f"embedded model, {options['num_inference_steps']} steps, guided"
    return what, compare(pipe, lambda count: pipe(["a sks owl"] * count, **options), repeats)


def sd15_unet(repeats: int) -> tuple[str, dict[str, float]]:
    """A call of a UNet of Stable Diffusion 1.5's size, with random weights."""
    with init_empty_weights():
        unet = UNet2DConditionModel(**SD15)
    unet = unet.to_empty(device="cpu").eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.uniform_(-0.02, 0.02)

    @torch.no_grad()
    def run(count: int) -> None:
        unet(torch.randn(count, 4, 32, 32), 500, torch.randn(count, 77, 768))

    return "SD 1.5's UNet, 256 px, one step", compare(unet, run, repeats)


def compare(model: Any, run: Callable[[int], Any], repeats: int) -> dict[str, float]:
    """Seconds for eight images, by way."""
    names = [f"subject{n}" for n in range(IMAGES)]
    for name in names:
        add_coeff_adapter(model, adapter_name=name)
        randomise(coeff_parameters(model, name))

    def batch_of_subjects() -> None:
        with coeff_per_sample(model, names):
            run(IMAGES)

    def batch_of_one() -> None:
        set_coeff_adapters(model, names[0])
        run(IMAGES)

    def single_calls() -> None:
        for name in names:
            set_coeff_adapters(model, name)
            run(1)

    def base() -> None:
        with coeff_disabled(model):
            run(IMAGES)

    ways = {"8 subjects": batch_of_subjects, "1 subject": batch_of_one, "8 calls": single_calls, "no adapter": base}
    run(1)
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, call in ways.items():
            times[way].append(seconds(call))
    return {way: statistics.median(taken) for way, taken in times.items()}


def resident_adapters(count: int) -> dict[str, float]:
    """Milliseconds and megabytes, for `count` adapters on a UNet with SDXL's 140 attention layers."""
    unet = UNet2DConditionModel(**SDXL_NARROW)
    add_coeff_adapter(unet, adapter_name="a0")
    randomise(coeff_parameters(unet))
    state = coeff_state_dict(unet, "a0")
    before = current_memory()
    loads = [
        seconds(lambda n=n: load_coeff_weights(unet, state, adapter_name=f"a{n}")) for n in range(1, count)
    ]  # a switch, too
    memory = current_memory() - before
    from_file = load_from_file(unet)
    switches = [seconds(lambda n=n: set_coeff_adapters(unet, f"a{7 * n % count}")) for n in range(50)]
    by_layer = [seconds(lambda: set_coeff_adapters(unet, "a0", {"attn2": 0.5})) for _ in range(20)]

    def enter(first: int) -> None:
        with coeff_per_sample(unet, [f"a{(first + n) % count}" for n in range(IMAGES)]):
            pass

    entered = [seconds(lambda n=n: enter(n)) for n in range(20)]
    assert len(coeff_parameters(unet, "a0")) == 140
    numbers = sum(delta.numel() for delta in state.values())
    return {
        "adapters": count,
        "coefficients of each": numbers,
        "MB of coefficients": count * numbers * 4 / 2**20,
        "MB of memory": memory,
        "ms to load one, the first 50": 1e3 * statistics.median(loads[:50]),
        "ms to load one, the last 50": 1e3 * statistics.median(loads[-50:]),
        "ms to load one from a file, the active ones unchanged": 1e3 * from_file,
        "ms to switch": 1e3 * statistics.median(switches),
        "ms to switch with weights by pattern": 1e3 * statistics.median(by_layer),
        "ms to enter and leave coeff_per_sample": 1e3 * statistics.median(entered),
    }


def load_from_file(unet: nn.Module) -> float:
    """Seconds for a file that has been read before, as a server does: another adapter stays active."""
    with tempfile.TemporaryDirectory() as folder:
        save_coeff_weights(unet, folder, adapter_name="a0")
        times = []
        for _ in range(50):
            times.append(seconds(lambda: load_coeff_weights(unet, folder, adapter_name="more", activate=False)))
            delete_coeff_adapters(unet, "more")
    return statistics.median(times)


def randomise(parameters: list[nn.Parameter]) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.05)


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def batch_table(results: list[tuple[str, dict[str, float]]]) -> str:
    lines = [
        "| 8 images | a batch of 8 subjects | a batch of 1 subject | 8 calls, with switches | a batch, no adapter |",
        "|---|---|---|---|---|",
    ]
    for what, times in results:
        whole = times["8 subjects"]
        shown = [f"{taken:.2f} s ({taken / whole:.2f})" for taken in times.values()]
        lines.append(f"| {what} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def resident_table(figures: dict[str, float]) -> str:
    rows = [
        f"| {what} | {figure:,.1f} |" if figure % 1 else f"| {what} | {figure:,} |" for what, figure in figures.items()
    ]
    return "\n".join(["| adapters on 140 layers | |", "|---|---|", *rows]) + "\n"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--skip_sd15", action="store_true", help="it needs 4 GB and some minutes")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/adapters.md"))
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
