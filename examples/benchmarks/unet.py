"""A UNet of Stable Diffusion 1.5's size: coefficients against the base model and against LoRA, time and memory.

    make bench            or            python examples/benchmarks/unet.py --repeats 3

Random weights, built from config. One denoising step at 512 px with guidance (batch 2), and one training step at 256
px with gradient checkpointing (batch 1, AdamW). All kinds take turns in one process, so that a change of the machine's
load meets all. Times are medians. Memory is the peak of resident memory above that before the step, on Linux.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from report import machine, peak_memory, write

from coeff_diffusers import add_coeff_adapter, coeff_parameters, unload_coeff_weights

KINDS = ("base", "coefficients", "LoRA, rank 4")


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(cross_attention_dim=768, sample_size=64).requires_grad_(False)  # the config of SD 1.5
    steps = {"512 px, denoising step": denoising_step, "256 px, training step": training_step}
    lines = [
        f"UNet of Stable Diffusion 1.5's size, float32, medians of {args.repeats}; {machine()}",
        "",
        "| | kind | trainable parameters | seconds | by the reference | MB above the start |",
        "|---|---|---|---|---|---|",
    ]
    for name, step in steps.items():
        results = measure(unet, step, args.repeats)
        reference = results["base" if step is denoising_step else "LoRA, rank 4"]
        for kind, (numbers, seconds, memory) in results.items():
            shown = f"| {name} | {kind} | {numbers:,} | {seconds:.2f} | {seconds / reference[1]:.3f} | {memory:.0f} |"
            lines.append(shown)
    write("\n".join(lines) + "\n", args.output)


def measure(
    unet: UNet2DConditionModel, step: Callable[..., None], repeats: int
) -> dict[str, tuple[int, float, float]]:
    """Kind -> number of trainable parameters, median seconds, greatest MB."""
    kinds = KINDS if step is denoising_step else KINDS[1:]
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    memory: dict[str, list[float]] = {kind: [] for kind in kinds}
    numbers = {}
    for attempt in range(repeats + 1):
        for kind in kinds:
            parameters = attach(unet, kind)
            numbers[kind] = sum(p.numel() for p in parameters)
            peak, taken = peak_memory(partial(timed, step, unet, parameters))
            if attempt:  # the first of each warms up
                seconds[kind].append(taken)
                memory[kind].append(peak)
            detach(unet, kind)
    return {kind: (numbers[kind], statistics.median(seconds[kind]), max(memory[kind])) for kind in kinds}


def timed(step: Callable[..., None], *args: Any) -> float:
    start = time.perf_counter()
    step(*args)
    return time.perf_counter() - start


def attach(unet: UNet2DConditionModel, kind: str) -> list[torch.nn.Parameter]:
    if kind == "coefficients":
        add_coeff_adapter(unet)
        parameters = coeff_parameters(unet)
        with torch.no_grad():
            for parameter in parameters:
                parameter.normal_(std=0.05)
        return parameters
    if kind.startswith("LoRA"):
        unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        return [p for p in unet.parameters() if p.requires_grad]
    return []


def detach(unet: UNet2DConditionModel, kind: str) -> None:
    if kind == "coefficients":
        unload_coeff_weights(unet)
    elif kind.startswith("LoRA"):
        unet.unload_lora()


@torch.no_grad()
def denoising_step(unet: UNet2DConditionModel, parameters: list[torch.nn.Parameter]) -> None:
    unet.eval()
    unet(torch.randn(2, 4, 64, 64), 500, torch.randn(2, 77, 768))


def training_step(unet: UNet2DConditionModel, parameters: list[torch.nn.Parameter]) -> None:
    unet.train()
    unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    unet(torch.randn(1, 4, 32, 32), 500, torch.randn(1, 77, 768)).sample.square().mean().backward()
    optimizer.step()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/unet.md"))
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
