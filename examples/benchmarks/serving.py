"""64 requests for 32 subjects that arrive at random: images a second and latency, against LoRA, with one model each.

    python examples/benchmarks/serving.py            # the embedded model, in this process and by HTTP
    python examples/benchmarks/serving.py --sd15     # a UNet of Stable Diffusion 1.5's size, random weights, latents

A request is an image. All ways have one queue and one pipeline: whenever the pipeline is free, the request that has
waited longest is taken, and those that can share its batch. They differ in which can, and in what chooses a subject:

- `base`: the base model for all; the most there is to have
- `a`: this package, any subjects in one batch
- `b`: this package, one subject a batch
- `c`: one subject a batch, `set_coeff_adapters` between batches
- `d`: one subject a batch, LoRA of rank 4 by peft, all 32 loaded, `set_adapters` between batches
- `e`: one subject a batch, LoRA of rank 4, one adapter, hot-swapped from its file between batches

The ways alternate within one run, with the same requests and arrivals. `server` is `coeff-diffusers serve` over HTTP:
the same requests with their subjects, and without. Coefficients and LoRAs are random, none is trained.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import torch
from accelerate import init_empty_weights
from adapters import MODEL, SD15
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from report import machine, write

from coeff_diffusers import (
    AdapterStore,
    add_coeff_adapter,
    coeff_parameters,
    coeff_per_sample,
    load_coeff_weights,
    save_coeff_weights,
    set_coeff_adapters,
    unload_coeff_weights,
)

PORT = 8765


@dataclass(frozen=True)
class Asked:
    """A request: its subject, and when it arrives, in seconds from the start."""

    subject: str
    at: float


@dataclass(frozen=True)
class Figures:
    """Of a run: images a second, and seconds from arrival to answer."""

    rate: float
    latencies: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.latencies)

    @property
    def high(self) -> float:
        """95th percentile."""
        return statistics.quantiles(self.latencies, n=20)[-1]


Call = Callable[[list[str]], Any]  # makes an image of each of these subjects, in one batch


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        text = sd15(args, Path(folder)) if args.sd15 else embedded(args, Path(folder))
    write(f"Serving, float32, medians of {args.repeats} runs; {machine()}\n\n{text}", args.output)


# ------------------------------------------------------------------------------------------------------------ the ways


def embedded(args: argparse.Namespace, folder: Path) -> str:
    names = [f"s{number:02d}" for number in range(args.subjects)]
    write_subjects(StableDiffusionPipeline.from_pretrained(MODEL), names, folder)
    options = {"num_inference_steps": args.steps, "guidance_scale": 2.5, "guidance_rescale": 0.7}

    def make(pipe: Any, count: int) -> Any:
        return pipe(["a sks owl on a blue background"] * count, **options)

    def load() -> Any:
        pipe = StableDiffusionPipeline.from_pretrained(MODEL)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    found, arrivals = in_process(args, folder, names, load, make)
    text = (
        f"Embedded model, {args.requests} requests, {args.steps} steps, {args.batch_size} images a batch at most.\n\n"
    )
    text += table(found, "base") + "\n"
    return text + table(by_http(args, folder, arrivals), "server, base")


def sd15(args: argparse.Namespace, folder: Path) -> str:
    torch.manual_seed(0)
    with init_empty_weights():
        unet = UNet2DConditionModel(**SD15)
    unet = unet.to_empty(device="cpu").eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.uniform_(-0.02, 0.02)
    names = [f"s{number:02d}" for number in range(args.subjects)]
    small = StableDiffusionPipeline.from_pretrained(MODEL)
    write_subjects(StableDiffusionPipeline(**{**small.components, "unet": unet}, requires_safety_checker=False), names,
                   folder)  # fmt: skip
    embeds = torch.randn(1, 77, 768)

    def load() -> Any:  # the one UNet, as it was
        pipe = StableDiffusionPipeline(**{**small.components, "unet": unet}, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def make(pipe: Any, count: int) -> Any:
        repeated = embeds.expand(count, -1, -1)
        return pipe(prompt_embeds=repeated, negative_prompt_embeds=repeated, num_inference_steps=args.steps,
                    height=256, width=256, output_type="latent")  # fmt: skip

    found, _ = in_process(args, folder, names, load, make)
    text = f"UNet of Stable Diffusion 1.5's size, {args.requests} requests for {args.subjects} subjects, {args.steps} "
    text += f"guided steps at latents of 64 x 64, {args.batch_size} images a batch at most.\n\n"
    return text + table(found, "base")


def in_process(
    args: argparse.Namespace, folder: Path, names: list[str], load: Callable[[], Any], make: Callable[[Any, int], Any]
) -> tuple[dict[str, list[Figures]], list[Asked]]:
    """Way -> the figures of each run; and the requests."""
    found: dict[str, list[Figures]] = {}
    arrivals: list[Asked] = []
    for _ in range(args.repeats):
        for way, (prepare, together) in WAYS.items():
            pipe = load()
            call, undo = prepare(pipe, folder, names, make)
            call(names[:1])  # what is done once is done
            if not arrivals:
                arrivals = draw(args, names, seconds_of(call, names[:1]))
            found.setdefault(way, []).append(serve_here(call, together, arrivals, args.batch_size))
            undo()
            print(way, f"{found[way][-1].rate:.3g} images/s", flush=True)
    return found, arrivals


def nothing() -> None: ...


def base(pipe: Any, folder: Path, names: list[str], make: Any) -> tuple[Call, Callable[[], None]]:
    return lambda subjects: make(pipe, len(subjects)), nothing


def by_store(pipe: Any, folder: Path, names: list[str], make: Any) -> tuple[Call, Callable[[], None]]:
    store = AdapterStore(folder).attach(pipe)

    def call(subjects: list[str]) -> Any:
        with coeff_per_sample(pipe, subjects):
            return make(pipe, len(subjects))

    def undo() -> None:
        store.detach()
        unload_coeff_weights(pipe)

    return call, undo


def by_set(pipe: Any, folder: Path, names: list[str], make: Any) -> tuple[Call, Callable[[], None]]:
    for name in names:
        load_coeff_weights(pipe, folder / f"{name}.safetensors", adapter_name=name)

    def call(subjects: list[str]) -> Any:
        set_coeff_adapters(pipe, subjects[0])
        return make(pipe, len(subjects))

    return call, lambda: unload_coeff_weights(pipe)


def by_peft(pipe: Any, folder: Path, names: list[str], make: Any) -> tuple[Call, Callable[[], None]]:
    for name in names:
        pipe.load_lora_weights(folder / "lora", weight_name=f"{name}.safetensors", adapter_name=name)

    def call(subjects: list[str]) -> Any:
        pipe.set_adapters(subjects[0])
        return make(pipe, len(subjects))

    return call, pipe.unload_lora_weights


def by_hotswap(pipe: Any, folder: Path, names: list[str], make: Any) -> tuple[Call, Callable[[], None]]:
    pipe.load_lora_weights(folder / "lora", weight_name=f"{names[0]}.safetensors", adapter_name="one")

    def call(subjects: list[str]) -> Any:
        weights = f"{subjects[0]}.safetensors"
        pipe.load_lora_weights(folder / "lora", weight_name=weights, adapter_name="one", hotswap=True)
        return make(pipe, len(subjects))

    return call, pipe.unload_lora_weights


WAYS: dict[str, tuple[Any, bool]] = {  # and whether different subjects go together
    "base": (base, True),
    "a": (by_store, True),
    "b": (by_store, False),
    "c": (by_set, False),
    "d": (by_peft, False),
    "e": (by_hotswap, False),
}


def write_subjects(pipe: Any, names: list[str], folder: Path) -> None:
    """A coefficient file and a LoRA of rank 4 (to_q, to_k, to_v, to_out.0) for each."""
    for number, name in enumerate(names):
        torch.manual_seed(number)
        add_coeff_adapter(pipe, adapter_name=name)
        with torch.no_grad():
            for parameter in coeff_parameters(pipe.unet, name):
                parameter.normal_(0, 0.1)
        save_coeff_weights(pipe, folder, weight_name=f"{name}.safetensors", adapter_name=name)
    unload_coeff_weights(pipe)
    config = LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights="gaussian")
    pipe.unet.add_adapter(config)
    for number, name in enumerate(names):
        torch.manual_seed(number)
        layers = get_peft_model_state_dict(pipe.unet)
        layers = {key: 0.05 * torch.randn_like(value) for key, value in layers.items()}
        pipe.save_lora_weights(folder / "lora", unet_lora_layers=layers, weight_name=f"{name}.safetensors")
    pipe.unload_lora_weights()


# ----------------------------------------------------------------------------------------------------------- the queue


def draw(args: argparse.Namespace, names: list[str], alone: float) -> list[Asked]:
    """Each subject as often as the others, in random order and at random times: `load` in the time of one alone."""
    rng = random.Random(args.seed)
    subjects = [names[number % len(names)] for number in range(args.requests)]
    rng.shuffle(subjects)
    at, asked = 0.0, []
    for subject in subjects:
        at += rng.expovariate(args.load / alone)
        asked.append(Asked(subject, at))
    return asked


def seconds_of(call: Call, subjects: list[str]) -> float:
    began = time.perf_counter()
    call(subjects)
    return time.perf_counter() - began


def serve_here(call: Call, together: bool, asked: Sequence[Asked], most: int) -> Figures:
    """One worker, which sleeps while nobody waits."""
    coming, latencies, began = list(asked), [], time.perf_counter()
    while coming:
        now = time.perf_counter() - began
        if coming[0].at > now:
            time.sleep(coming[0].at - now)
            continue
        waiting = [each for each in coming if each.at <= now]
        batch = [each for each in waiting if together or each.subject == waiting[0].subject][:most]
        call([each.subject for each in batch])
        done = time.perf_counter() - began
        latencies += [done - each.at for each in batch]
        coming = [each for each in coming if each not in batch]
    return Figures(len(asked) / (time.perf_counter() - began - asked[0].at), tuple(latencies))


# ---------------------------------------------------------------------------------------------------------- the server


def by_http(args: argparse.Namespace, folder: Path, asked: list[Asked]) -> dict[str, list[Figures]]:
    found: dict[str, list[Figures]] = {}
    with server(args, folder) as url:
        ask(url, args, "s00")
        for _ in range(args.repeats):
            for way in ("server, base", "server"):
                figures = serve_by_http(url, args, asked, subjects=way == "server")
                found.setdefault(way, []).append(figures)
                print(way, f"{figures.rate:.2f} images/s", flush=True)
    return found


def serve_by_http(url: str, args: argparse.Namespace, asked: list[Asked], subjects: bool) -> Figures:
    began = time.perf_counter()

    def one(each: Asked) -> float:
        time.sleep(max(0.0, each.at - (time.perf_counter() - began)))
        ask(url, args, each.subject if subjects else None)
        return time.perf_counter() - began - each.at

    with ThreadPoolExecutor(len(asked)) as clients:
        latencies = tuple(clients.map(one, asked))
    return Figures(len(asked) / (time.perf_counter() - began - asked[0].at), latencies)


def ask(url: str, args: argparse.Namespace, subject: str | None) -> None:
    body = {"prompt": "a sks owl on a blue background", "subject": subject, "seed": 0, "response_format": "png"}
    response = requests.post(f"{url}/v1/images", json=body | {"num_inference_steps": args.steps}, timeout=600)
    response.raise_for_status()


@contextmanager
def server(args: argparse.Namespace, folder: Path) -> Iterator[str]:
    flags = {"pretrained_model_name_or_path": MODEL, "adapters": folder, "port": PORT, "num_cpus": args.threads}
    flags |= {"max_batch_size": args.batch_size, "max_queued_requests": args.requests}
    command = [sys.executable, "-m", "coeff_diffusers", "serve"]
    command += [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if "Ctrl-C stops" in line:
                break
        threading.Thread(target=process.stdout.read, daemon=True).start()
        yield f"http://127.0.0.1:{PORT}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


# ----------------------------------------------------------------------------------------------------------- the table


def table(found: dict[str, list[Figures]], reference: str) -> str:
    rows = [
        "| way | images a second | of the base | median latency, s | 95th percentile, s |",
        "|---|---|---|---|---|",
    ]
    for way, runs in found.items():
        rate = statistics.median(run.rate for run in runs)
        share = statistics.median(run.rate / other.rate for run, other in zip(runs, found[reference]))
        median, high = (statistics.median(getattr(run, name) for run in runs) for name in ("median", "high"))
        rows.append(f"| {way} | {rate:.3g} | {share:.2f} | {median:.2f} | {high:.2f} |")
    return "\n".join(rows) + "\n"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sd15", action="store_true")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--subjects", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--load", type=float, default=8.0, help="images that arrive while one is made alone")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/serving.md"))
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
