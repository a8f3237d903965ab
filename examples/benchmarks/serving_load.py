"""A load test of `coeff-diffusers serve` by locust: is every image the one made alone, and does memory stay flat?

    pip install locust
    python examples/benchmarks/serving_load.py --minutes 10 --clients 24

Makes the images that will be asked for one by one in this process, starts the server on the embedded model, has
locust's clients ask for them at random, as fast as they are answered, and compares each answer. Prints what came of
the requests, latencies, and the memory of all of the server's processes over time.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PROMPTS = ("a sks owl on a blue background", "a small pig face on a green background", "a bee on a pink background")
STEPS = 10
EXPECTED = os.environ.get("SERVING_LOAD_EXPECTED")  # set where locust reads this file


def expected_images(path: str) -> dict[str, Any]:
    with np.load(path) as file:
        return dict(file)


def is_right(data: bytes, expected: Any) -> bool:
    """But for what a batch of another size rounds otherwise: a step of 255."""
    image = np.asarray(Image.open(io.BytesIO(data))).astype(int)
    return image.shape == expected.shape and int(np.abs(image - expected).max()) <= 1


if EXPECTED:  # a client, in locust's process
    from locust import HttpUser, constant, task

    IMAGES = expected_images(EXPECTED)

    class Client(HttpUser):
        wait_time = constant(0)

        @task
        def image(self) -> None:
            key = random.choice(list(IMAGES))
            subject, prompt, seed = json.loads(key)
            body = {"prompt": prompt, "subject": subject, "seed": seed, "num_inference_steps": STEPS}
            asked = body | {"response_format": "png"}
            with self.client.post("/v1/images", json=asked, name="image", catch_response=True) as answer:
                if answer.status_code == 503:
                    self.environment.events.request.fire(
                        request_type="POST", name="503", response_time=0, response_length=0, exception=None, context={}
                    )
                    answer.success()
                    time.sleep(float(answer.headers["Retry-After"]))
                elif answer.status_code != 200:
                    answer.failure(f"{answer.status_code}: {answer.text[:200]}")
                elif not is_right(answer.content, IMAGES[key]):
                    answer.failure(f"a wrong image for {key}")
                else:
                    answer.success()


def main(args: argparse.Namespace) -> None:
    from diffusers import StableDiffusionPipeline
    from serving import MODEL, PORT, server, write_subjects

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "subjects"
        pipe = StableDiffusionPipeline.from_pretrained(MODEL)
        pipe.set_progress_bar_config(disable=True)
        names = [f"s{number:02d}" for number in range(args.subjects)]
        write_subjects(pipe, names, folder)
        expected = make_alone(pipe, folder, names, args.images)
        path = Path(temporary) / "expected.npz"
        np.savez(path, **expected)
        args.steps, args.requests, args.batch_size = STEPS, args.queue, 8
        with server(args, folder):
            report(args, run_locust(args, path, f"http://127.0.0.1:{PORT}"))


def make_alone(pipe: Any, folder: Path, names: list[str], count: int) -> dict[str, Any]:
    """JSON of subject, prompt and seed -> pixels."""
    import torch

    from coeff_diffusers import coeff_disabled, coeff_per_sample, load_coeff_weights

    for name in names:
        load_coeff_weights(pipe, folder / f"{name}.safetensors", adapter_name=name)
    rng, images = random.Random(0), {}
    for number in range(count):
        subject, prompt = (None if number % 8 == 0 else names[number % len(names)]), rng.choice(PROMPTS)
        options = {"num_inference_steps": STEPS, "guidance_scale": 2.5, "guidance_rescale": 0.7}
        with coeff_disabled(pipe) if subject is None else coeff_per_sample(pipe, [subject]):
            image = pipe([prompt], generator=torch.Generator().manual_seed(number), **options).images[0]
        images[json.dumps([subject, prompt, number])] = np.asarray(image)
    return images


def run_locust(args: argparse.Namespace, expected: Path, url: str) -> tuple[list[tuple[float, float]], list[Any]]:
    """Seconds and MB of the server's processes, and locust's own figures."""
    table = expected.with_suffix(".json")
    command = [sys.executable, "-m", "locust", "--locustfile", __file__, "--headless", "--host", url, "--only-summary"]
    command += ["--users", str(args.clients), "--spawn-rate", "8", "--run-time", f"{args.minutes}m"]
    command += ["--json-file", str(table.with_suffix(""))]
    process = subprocess.Popen(command, env=os.environ | {"SERVING_LOAD_EXPECTED": str(expected)})
    memory, began = [], time.monotonic()
    while process.poll() is None:
        memory.append((time.monotonic() - began, server_memory()))
        time.sleep(10)
    return memory, json.loads(table.read_text())


def server_memory() -> float:
    """MB that the server's processes have of their own and share among themselves, each shared page counted once."""
    import psutil

    processes = psutil.Process().children(recursive=True)
    total = 0.0
    for process in processes:
        try:
            if "locust" not in " ".join(process.cmdline()):
                total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total / 2**20


def report(args: argparse.Namespace, measured: tuple[list[tuple[float, float]], list[Any]]) -> None:
    from report import machine, write

    memory, rows = measured
    counts = Counter({row["name"]: row["num_requests"] for row in rows})
    image = next(row for row in rows if row["name"] == "image")
    tenth = max(1, len(memory) // 10)
    levels = [sum(level for _, level in part) / len(part) for part in (memory[tenth : 2 * tenth], memory[-tenth:])]
    failed = sum(row["num_failures"] for row in rows)
    lines = [
        f"Load test, {args.minutes} minutes, {args.clients} clients, {args.subjects} subjects; {machine()}",
        "",
        f"- {counts['image'] - counts['503'] - failed} right images, {failed} wrong images and other errors, "
        f"{counts['503']} answers of 503 of a queue of {args.queue}",
        f"- mean latency of all answers {image['total_response_time'] / image['num_requests'] / 1000:.2f} s, "
        f"at most {image['max_response_time'] / 1000:.2f} s",
        f"- memory of the server's processes: {levels[0]:.0f} MB in the second tenth, {levels[1]:.0f} MB in "
        f"the last tenth, {max(level for _, level in memory):.0f} MB at most",
    ]
    write("\n".join(lines) + "\n", args.output)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=int, default=10)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--queue", type=int, default=8, help="requests that wait before 503 is answered")
    parser.add_argument("--subjects", type=int, default=32)
    parser.add_argument("--images", type=int, default=96, help="how many different ones are asked for")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/serving_load.md"))
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
