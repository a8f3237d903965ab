"""Attention with coefficients on a GPU: is it right, what does it take, and which tiles are best for this card.

    python examples/benchmarks/gpu.py                # on a machine with a GPU, 8 minutes at most
    python examples/benchmarks/gpu.py --dry          # the same code on a CPU, on tiny sizes: says nothing of speed

Needs torch, triton and diffusers, and this checkout, which need not be installed; peft, if it is there, for the rows
of LoRA. No download. Writes as it goes, `examples/benchmarks/results/CARD.json` and `CARD.md`, so that a run that is
stopped has written what it had. gpu.md beside this file says how to read and to add them.

What matters most comes first: 1. outputs and gradients against float64, as multiples of the error of PyTorch's own
attention (SDPA); 2. time and memory of attention, against SDPA by cuDNN and FlashAttention; 3. whole models of the
released sizes, with random weights; 4. other tiles than the table's (coeff_diffusers/backends/tiles.py), best last.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from coeff_diffusers import (
    add_coeff_adapter,
    coeff_parameters,
    coeff_per_sample,
    get_mixing_backend,
    mixed_attention,
    set_mixing_backend,
    unload_coeff_weights,
)
from coeff_diffusers.backends import gpu, tiles
from coeff_diffusers.functional import mixed_attention_reference

BF16, FP16 = torch.bfloat16, torch.float16
SHAPES = {  # B, H, T, S, D, dtype
    "SDXL, 1024 px, second level": (2, 10, 4096, 4096, 64, BF16),
    "SDXL, 1024 px, third level": (2, 20, 1024, 1024, 64, BF16),
    "SDXL, 1024 px, text": (2, 10, 4096, 77, 64, BF16),
    "SD 1.5, 512 px, first level": (2, 8, 4096, 4096, 40, FP16),
    "FLUX.1, 1024 px": (1, 24, 4608, 4608, 128, BF16),
    "SD 3.5 large, 1024 px": (1, 38, 4250, 4250, 64, BF16),
}
DRY_SHAPES = {"tiny": (1, 3, 20, 33, 16, BF16), "tiny, text": (2, 2, 18, 7, 16, FP16)}
CHECKS = [  # B, H, T, S, D, dtype, mask
    (2, 10, 200, 333, 64, BF16, None),
    (2, 10, 200, 333, 64, FP16, "boolean"),
    (1, 24, 130, 257, 128, BF16, "added"),
    (1, 38, 100, 77, 64, FP16, None),
    (2, 8, 128, 77, 40, BF16, "keys"),
    (1, 20, 150, 150, 72, BF16, "causal"),
    (1, 5, 700, 4096, 64, BF16, "empty row"),
    (1, 10, 1024, 4096, 64, BF16, None),
]
DRY_CHECKS = [(1, 3, 20, 33, 16, BF16, mask) for mask in (None, "boolean", "added", "keys", "causal", "empty row")]


class Bench:
    """What was found, where it goes, and how much time is left."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.start = args, time.monotonic()
        self.dry = args.dry
        self.device = torch.device("cpu" if args.dry else "cuda")
        self.rows: list[dict[str, Any]] = []
        self.card = "dry run" if args.dry else torch.cuda.get_device_name()
        self.path = args.output / self.card.replace(" ", "_").replace("/", "_")
        self.about = about(self)

    def left(self) -> float:
        return self.args.seconds - (time.monotonic() - self.start)

    def note(self, part: str, **row: Any) -> None:
        if gpu._failures:  # another row's kernel did not run: this one must not be torch's loop by another name
            row["not_triton"] = str(list(gpu._failures.values()))[:200]
            gpu._failures.clear()
        self.rows.append({"part": part, **row})
        shown = " ".join(
            f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items()
        )
        print(f"{time.monotonic() - self.start:5.0f} s  {part}: {shown}", flush=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        written = {**self.about, "seconds": round(time.monotonic() - self.start), "rows": self.rows}
        self.path.with_suffix(".json").write_text(json.dumps(written, indent=1) + "\n")
        self.path.with_suffix(".md").write_text(markdown(self.about, self.rows))

    @contextlib.contextmanager
    def part(self, name: str, least_seconds: float, **row: Any) -> Iterator[None]:
        """Runs what is within, unless time is short; what fails is noted, and the next part goes on."""
        if self.left() < least_seconds:
            self.note(name, **row, left_out=f"{self.left():.0f} s left, {least_seconds:.0f} needed")
            raise _OutOfTimeError
        try:
            yield
        except Exception as error:  # of a card's memory, or of a version: a result, too
            self.note(
                name, **row, failed=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
            )
        finally:
            free()


class _OutOfTimeError(Exception):
    pass


def about(bench: Bench) -> dict[str, Any]:
    found = {"card": bench.card, "date": str(datetime.date.today()), "torch": torch.__version__}
    found |= {"diffusers": diffusers.__version__, "triton": gpu.triton_version() if gpu.is_installed() else "none"}
    if not bench.dry:
        found |= {"architecture": gpu.architecture(bench.device), "driver": driver()}
        found |= {"cuda": torch.version.cuda or torch.version.hip, "cudnn": torch.backends.cudnn.version()}
    return found


def driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    if args.warm is not None:
        jobs_to_warm()[args.warm]()
        return
    bench = Bench(args)
    if not bench.dry:
        compile_ahead(bench)
        backend = get_mixing_backend("cuda", BF16)
        bench.note("environment", backend=backend, **speed_of_card(bench))
        if backend != "triton":
            raise SystemExit("the Triton kernels do not run here: see the warnings above; gpu.md names what they need")
    shapes = DRY_SHAPES if bench.dry else SHAPES
    jobs: list[Callable[[], None]] = [
        lambda case=case: check(bench, *case) for case in (DRY_CHECKS if bench.dry else CHECKS)
    ]
    jobs += [lambda name=name: attention(bench, name, shapes[name]) for name in shapes]
    jobs += [lambda name=name: model(bench, name) for name in MODELS]
    jobs += [lambda: subjects(bench), lambda: compiled(bench)]
    jobs += [lambda name=name: sweep(bench, name, shapes[name]) for name in shapes]
    for job in jobs:
        with contextlib.suppress(_OutOfTimeError):
            job()
    bench.note("end", left=bench.left())
    print(markdown(bench.about, bench.rows))


# 1. Is it right


def check(bench: Bench, B: int, H: int, T: int, S: int, D: int, dtype: torch.dtype, kind: str | None) -> None:
    row = {"shape": f"{B}, {H}, {T}, {S}, {D}", "dtype": str(dtype)[6:], "mask": str(kind)}
    with bench.part("check", 5, **row):
        query, key, value, coeff, grad_out = inputs(bench, (B, H, T, S, D, dtype))
        mask = mask_of(bench, B, H, T, S, D, dtype, kind)
        options = {"is_causal": kind == "causal"}
        wide_mask = mask.double() if mask is not None and mask.dtype != torch.bool else mask

        def all_of(call: Callable[..., Tensor], args: list[Tensor], grad: Tensor) -> list[Tensor]:
            args = [x.detach().requires_grad_() for x in args]
            out = call(*args)
            return [out.detach(), *torch.autograd.grad(out, args, grad)]

        ours = all_of(lambda *a: mixed_attention(*a, mask, **options), [query, key, value, coeff], grad_out)
        exact = all_of(
            lambda *a: mixed_attention_reference(*a, wide_mask, **options),
            [x.double() for x in (query, key, value, coeff)],
            grad_out.double(),
        )
        sdpa = all_of(lambda *a: F.scaled_dot_product_attention(*a, mask, **options), [query, key, value], grad_out)
        zero = [x.double() for x in (query, key, value)]
        sdpa_exact = all_of(
            lambda *a: mixed_attention_reference(*a, torch.zeros_like(coeff).double(), wide_mask, **options),
            zero,
            grad_out.double(),
        )
        errors = [relative(*pair) for pair in zip(ours, exact)]
        theirs = [relative(*pair) for pair in zip(sdpa, sdpa_exact)]
        ratios = [error / max(own, 1e-12) for error, own in zip(errors, [*theirs, theirs[3]])]
        names = ("output", "query", "key", "value", "coefficients")
        bench.note("check", **row, right=all(ratio <= 2.0 for ratio in ratios), **dict(zip(names, ratios)))


def mask_of(
    bench: Bench, B: int, H: int, T: int, S: int, D: int, dtype: torch.dtype, kind: str | None
) -> Tensor | None:
    if kind == "boolean":
        return torch.rand(B, 1, T, S, device=bench.device) > 0.3
    if kind == "empty row":
        return (torch.rand(1, 1, T, 1, device=bench.device) > 0.3).expand(1, 1, T, S)
    if kind == "keys":
        return torch.rand(B, 1, 1, S, device=bench.device) > 0.3
    if kind == "added":
        return torch.randn(1, H, 1, S, device=bench.device).to(dtype)
    return None


def relative(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


# 2. What attention takes


def attention(bench: Bench, name: str, shape: tuple) -> None:
    """By replays of a CUDA graph, and as called: small kernels take less time than it takes to launch them."""
    with bench.part("attention", 15, shape=name):
        query, key, value, coeff, grad_out = inputs(bench, shape)
        row: dict[str, Any] = {"shape": name, "sizes": ", ".join(map(str, shape[:5])), "dtype": str(shape[5])[6:]}
        for label, backend in (("cuDNN", "CUDNN_ATTENTION"), ("flash", "FLASH_ATTENTION"), ("default", None)):
            with contextlib.suppress(RuntimeError):
                context = sdpa_kernel(getattr(SDPBackend, backend)) if backend else contextlib.nullcontext()
                with context:
                    row |= times(bench, label, F.scaled_dot_product_attention, [query, key, value], grad_out)
        mixing = [query, key, value, coeff]
        row |= times(bench, "mixed", mixed_attention, mixing, grad_out)
        row |= times(bench, "mixed_one_matrix", mixed_attention, [*mixing[:3], coeff[0].clone()], grad_out)
        row |= times(bench, "zero", mixed_attention, [*mixing[:3], torch.zeros_like(coeff)], grad_out)
        row |= memory(bench, mixed_attention, mixing, grad_out)
        bench.note("attention", **row)
    with bench.part("loop", 15, shape=name), backend_of("torch"):
        bench.note("loop", shape=name, **times(bench, "loop", mixed_attention, mixing, grad_out))


def times(
    bench: Bench, label: str, call: Callable[..., Tensor], args: list[Tensor], grad_out: Tensor
) -> dict[str, float]:
    """Milliseconds forward, and forward with backward: of a graph's replay, and `eager`, as called."""
    wanting = [x.detach().requires_grad_() for x in args]

    def forward() -> None:
        with torch.no_grad():
            call(*args)

    def both() -> None:
        torch.autograd.grad(call(*wanting), wanting, grad_out)

    found = {}
    for way, run in (("forward", forward), ("both", both)):
        found[f"{label}_{way}"] = milliseconds(bench, run if bench.dry else graphed(run), 10)
        found[f"{label}_{way}_eager"] = milliseconds(bench, run, 5)
    return found


def memory(bench: Bench, call: Callable[..., Tensor], args: list[Tensor], grad_out: Tensor) -> dict[str, float]:
    """MB above inputs, output and gradients."""
    if bench.dry:
        return {}
    wanting = [x.detach().requires_grad_() for x in args]
    found = {}
    for name, run in {
        "forward_mb": lambda: [call(*args)],
        "both_mb": lambda: [out := call(*wanting), *torch.autograd.grad(out, wanting, grad_out)],
    }.items():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.set_grad_enabled(name == "both_mb"):
            results = run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        found[name] = (peak - sum(x.numel() * x.element_size() for x in results)) / 2**20
    return found


# 3. Whole models


def sdxl(small: bool) -> tuple[nn.Module, Callable[[int], dict[str, Any]]]:
    channels, heads, text = ((320, 640, 1280), (5, 10, 20), 2048) if not small else ((8, 16, 32), (1, 2, 4), 16)
    unet = diffusers.UNet2DConditionModel(
        sample_size=128,
        block_out_channels=channels,
        attention_head_dim=heads,
        cross_attention_dim=text,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10) if not small else 1,
        norm_num_groups=32 if not small else 4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256 if not small else 8,
        projection_class_embeddings_input_dim=2816 if not small else 64,
    )
    pixels, pooled = (128, 1280) if not small else (8, 16)

    def call(batch: int) -> dict[str, Any]:
        added = {"text_embeds": torch.randn(batch, pooled), "time_ids": torch.full((batch, 6), 1024.0)}
        latents, prompt = torch.randn(batch, 4, pixels, pixels), torch.randn(batch, 77, text)
        timestep = torch.full((batch,), 500)
        return {"sample": latents, "timestep": timestep, "encoder_hidden_states": prompt, "added_cond_kwargs": added}

    return unet, call


def flux(small: bool) -> tuple[nn.Module, Callable[[int], dict[str, Any]]]:
    sizes = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}
    sizes |= {"joint_attention_dim": 16, "pooled_projection_dim": 16, "axes_dims_rope": (4, 4, 8)}
    transformer = diffusers.FluxTransformer2DModel(**(sizes if small else {}))
    tokens, text, pooled, words = (4096, 4096, 768, 512) if not small else (16, 16, 16, 8)

    def call(batch: int) -> dict[str, Any]:
        positions = {"img_ids": torch.zeros(tokens, 3), "txt_ids": torch.zeros(words, 3)}
        latents, prompt = torch.randn(batch, tokens, 64), torch.randn(batch, words, text)
        timestep = torch.full((batch,), 0.5)
        pooled_prompt = torch.randn(batch, pooled)
        return {
            "hidden_states": latents,
            "encoder_hidden_states": prompt,
            "pooled_projections": pooled_prompt,
            "timestep": timestep,
            **positions,
        }

    return transformer, call


def sd35(small: bool) -> tuple[nn.Module, Callable[[int], dict[str, Any]]]:
    heads, width, layers, text, pooled = (38, 64, 38, 4096, 2048) if not small else (2, 16, 1, 16, 16)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=128,
        num_layers=layers,
        attention_head_dim=width,
        num_attention_heads=heads,
        joint_attention_dim=text,
        caption_projection_dim=heads * width,
        pooled_projection_dim=pooled,
        pos_embed_max_size=192,
        qk_norm="rms_norm",
    )
    pixels, words = (128, 154) if not small else (8, 6)

    def call(batch: int) -> dict[str, Any]:
        latents, prompt = torch.randn(batch, 16, pixels, pixels), torch.randn(batch, words, text)
        timestep = torch.full((batch,), 500.0)
        pooled_prompt = torch.randn(batch, pooled)
        return {
            "hidden_states": latents,
            "encoder_hidden_states": prompt,
            "pooled_projections": pooled_prompt,
            "timestep": timestep,
        }

    return transformer, call


MODELS: dict[str, tuple[Callable[..., Any], int, bool]] = {  # how it is built, batch, training as well
    "SDXL": (sdxl, 2, True),
    "FLUX.1": (flux, 1, False),
    "SD 3.5 large": (sd35, 2, False),
}
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@contextlib.contextmanager
def built(bench: Bench, make: Callable[..., Any], batch: int) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    """A model with random weights in bfloat16, and arguments of a call, made on the device."""
    torch.set_default_dtype(BF16)
    try:
        with bench.device:
            denoiser, call = make(bench.dry)
            kwargs = call(batch)
    finally:
        torch.set_default_dtype(torch.float32)
    yield denoiser.requires_grad_(False).eval(), kwargs


def model(bench: Bench, name: str) -> None:
    """A denoising step, and SDXL's training step: the base, coefficients, and LoRA beside the weights or within."""
    make, batch, trains = MODELS[name]
    with bench.part("model", 40, model=name), built(bench, make, batch) as (denoiser, kwargs):

        @torch.no_grad()
        def step() -> None:
            denoiser(**kwargs)

        for kind in ("base", "coefficients", "LoRA", "LoRA, fused"):
            row: dict[str, Any] = {"model": name, "kind": kind}
            with bench.part("model", 20, **row), attached(denoiser, kind) as parameters:
                row["trainable"] = sum(p.numel() for p in parameters)
                row["step"] = milliseconds(bench, step, 5)
                if trains and parameters and kind != "LoRA, fused":
                    row |= training(bench, denoiser, kwargs, parameters)
                bench.note("model", **row)
                if not bench.dry and kind in ("base", "coefficients"):
                    bench.note("model", model=name, kind=f"{kind}, graph", step=milliseconds(bench, graphed(step), 5))


@contextlib.contextmanager
def attached(denoiser: nn.Module, kind: str) -> Iterator[list[nn.Parameter]]:
    if kind == "coefficients":
        add_coeff_adapter(denoiser)
        parameters = coeff_parameters(denoiser)
        for parameter in parameters:
            nn.init.normal_(parameter, std=0.05)
        yield parameters
        unload_coeff_weights(denoiser)
    elif kind.startswith("LoRA"):
        from peft import LoraConfig

        denoiser.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=LORA_TARGETS))
        if kind == "LoRA, fused":
            denoiser.fuse_lora()
        yield [p for p in denoiser.parameters() if p.requires_grad]
        if kind == "LoRA, fused":
            denoiser.unfuse_lora()
        denoiser.unload_lora()
    else:
        yield []


def training(
    bench: Bench, denoiser: nn.Module, kwargs: dict[str, Any], parameters: list[nn.Parameter]
) -> dict[str, float]:
    """Milliseconds and MB at the peak of a step with gradient checkpointing, without the optimizer's."""
    denoiser.train()
    denoiser.enable_gradient_checkpointing()

    def step() -> None:
        denoiser(**kwargs).sample.float().square().mean().backward()
        for parameter in parameters:
            parameter.grad = None

    if not bench.dry:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    row = {"training": milliseconds(bench, step, 3)}
    if not bench.dry:
        row["training_mb"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    denoiser.disable_gradient_checkpointing()
    denoiser.eval()
    return row


def subjects(bench: Bench) -> None:
    """Eight images of SDXL: of one subject, and of eight."""
    with bench.part("subjects", 40), built(bench, sdxl, 8) as (unet, kwargs):
        names = [f"subject{n}" for n in range(8)]
        for name in names:
            add_coeff_adapter(unet, adapter_name=name)
            for parameter in coeff_parameters(unet, name):
                nn.init.normal_(parameter, std=0.05)

        @torch.no_grad()
        def step() -> None:
            unet(**kwargs)

        row = {}
        for label, chosen in (("one", names[:1] * 8), ("eight", names)):
            with coeff_per_sample(unet, chosen):
                row[f"{label}_step"] = milliseconds(bench, step, 3)
        bench.note("subjects", **row)


def compiled(bench: Bench) -> None:
    """SDXL's step with its transformer blocks compiled."""
    if bench.dry:
        return
    with bench.part("compiled", 150), built(bench, sdxl, 2) as (unet, kwargs):

        @torch.no_grad()
        def step() -> None:
            unet(**kwargs)

        for kind in ("base", "coefficients"):
            with attached(unet, kind):
                torch._dynamo.reset()
                unet.compile_repeated_blocks(fullgraph=True)
                bench.note("compiled", model="SDXL", kind=kind, step=milliseconds(bench, step, 5))


# 4. Other tiles


def sweep(bench: Bench, name: str, shape: tuple) -> None:
    """One field of the table changed at a time, then all that gained at once; by graphs' replays."""
    if bench.dry:
        return
    with bench.part("sweep", 30, shape=name):
        query, key, value, coeff, grad_out = inputs(bench, shape)
        _, H, T, S, D, _ = shape
        usual = tiles.choose(gpu.architecture(bench.device), H, D, T, S)
        original = tiles.choose
        args = (query, key, value, coeff, None)
        scale = D**-0.5

        def forward() -> tuple[Tensor, Tensor]:  # of the kernels themselves, without what takes over where they fail
            return gpu.forward(*args, False, scale)

        def both() -> None:
            gpu.backward(grad_out, *args, forward()[1], False, scale, [True] * 4)

        calls: dict[str, Callable[[], Any]] = {"forward": forward, "both": both}
        usually = {label: milliseconds(bench, graphed(call), 5) for label, call in calls.items()}
        gains: dict[str, Any] = {}
        try:
            for field, values in variants(usual).items():
                label = "forward" if field in ("exps", "mix", "times", "strip_bytes") else "both"
                fastest = usually[label]
                for other in values:
                    if bench.left() < 10:
                        break
                    tiles.choose = lambda *args, field=field, other=other: usual._replace(**{field: other})
                    try:
                        taken = milliseconds(bench, graphed(calls[label]), 5)
                    except Exception as error:  # too much shared memory, say
                        bench.note("tile", shape=name, field=field, value=str(other), failed=str(error)[:80])
                        continue
                    ratio = taken / usually[label]
                    bench.note("tile", shape=name, field=field, value=str(other), of=label, ratio=ratio)
                    if taken < 0.98 * fastest:
                        fastest, gains[field] = taken, other
            tiles.choose = lambda *args: usual._replace(**gains)
            together = {label: milliseconds(bench, graphed(call), 5) / usually[label] for label, call in calls.items()}
            bench.note("sweep", shape=name, **{field: str(other) for field, other in gains.items()}, **together)
        finally:
            tiles.choose = original


def variants(usual: tiles.Tiles) -> dict[str, list[Any]]:
    """What else each field might be: stages, warps, halves and doubles of a tile, and strips."""
    found: dict[str, list[Any]] = {
        "strip_bytes": [n * 2**20 for n in (12, 24, 48, 96) if n * 2**20 != usual.strip_bytes],
    }
    for field in ("exps", "mix", "times", "maps", "grads", "keys"):
        tile: tiles.Tile = getattr(usual, field)
        others = [tile._replace(stages=stages) for stages in (1, 2, 3, 4)]
        others += [tile._replace(warps=warps) for warps in (4, 8)]
        others += [tile._replace(tiles=count) for count in (1, 2, 8) if tile.tiles > 1]
        others += [tile._replace(rows=rows) for rows in (tile.rows // 2, tile.rows * 2) if 16 <= rows <= 128]
        others += [tile._replace(keys=keys) for keys in (tile.keys // 2, tile.keys * 2) if 16 <= keys <= 256]
        found[field] = [other for other in dict.fromkeys(others) if other != tile]
    found["backward_bytes"] = [n * 2**20 for n in (36, 72, 144, 256) if n * 2**20 != usual.backward_bytes]
    return found


# Tools


def inputs(bench: Bench, shape: tuple) -> list[Tensor]:
    """query, key, value in the layout of models, coefficients of each sample, and a gradient of the output."""
    B, H, T, S, D, dtype = shape
    drawn = [torch.randn(B, n, H, D, device=bench.device).to(dtype).transpose(1, 2) for n in (T, S, S, T)]
    return [*drawn[:3], 0.1 * torch.randn(B, H, H, device=bench.device), drawn[3]]


def milliseconds(bench: Bench, call: Callable[[], Any], repeats: int = 20) -> float:
    """Median, after two calls that warm up, by the device's own clock. Short calls are timed several at once."""
    if bench.dry:
        start = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - start)
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    at_once = max(1, min(20, int(0.01 / (time.perf_counter() - start))))
    taken = []
    for _ in range(repeats):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        for _ in range(at_once):
            call()
        last.record()
        last.synchronize()
        taken.append(first.elapsed_time(last) / at_once)
    return statistics.median(taken)


def graphed(call: Callable[[], Any]) -> Callable[[], None]:
    """The replay of a CUDA graph of the call: its time without that of launching."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@contextlib.contextmanager
def backend_of(name: str) -> Iterator[None]:
    set_mixing_backend(name)
    try:
        yield
    finally:
        set_mixing_backend("auto")


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def speed_of_card(bench: Bench) -> dict[str, float]:
    properties = torch.cuda.get_device_properties(bench.device)
    x = torch.randn(8192, 8192, device=bench.device, dtype=BF16)
    product = milliseconds(bench, lambda: x @ x)
    y = torch.empty(2**30, device=bench.device, dtype=torch.uint8)
    copy = milliseconds(bench, y.clone)
    return {
        "multiprocessors": properties.multi_processor_count,
        "l2_mb": properties.L2_cache_size / 2**20,
        "tflops": 2 * 8192**3 / product / 1e9,
        "copy_gb_s": 2 * 2**30 / copy / 1e6,
    }


def compile_ahead(bench: Bench) -> None:
    """Fills Triton's cache on the disk, several processes at the same time: compiling takes longest."""
    with bench.part("compiling", 60):
        start = time.monotonic()
        command = [sys.executable, __file__, "--warm"]
        processes = [
            subprocess.Popen([*command, str(job)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            for job in range(len(jobs_to_warm()))
        ]
        try:
            for job, process in enumerate(processes):
                _, errors = process.communicate(timeout=max(1, 150 - (time.monotonic() - start)))
                if process.returncode:
                    failed = errors.strip().splitlines()[-1][:200] if errors.strip() else ""
                    bench.note("compiling", job=job, failed=failed)
        finally:
            for process in processes:
                process.kill()
        bench.note("compiling", took=time.monotonic() - start)


def jobs_to_warm() -> list[Callable[[], None]]:
    """What compiles what this script runs: shapes, with a matrix a sample and one for all; checks; the card's own."""
    bench = argparse.Namespace(device=torch.device("cuda"))

    def run(shape: tuple, one_matrix: bool, mask: Tensor | None = None, causal: bool = False) -> None:
        query, key, value, coeff, grad_out = inputs(bench, shape)  # type: ignore[arg-type]
        args = (query, key, value, coeff[0].clone() if one_matrix else coeff, mask)
        scale = shape[4] ** -0.5
        _, statistics_ = gpu.forward(*args, causal, scale)
        gpu.backward(grad_out, *args, statistics_, causal, scale, [True] * 4)

    jobs = [lambda shape=shape: (run(shape, False), run(shape, True)) for shape in SHAPES.values()]
    jobs += [
        lambda case=case: run(case[:6], False, mask_of(bench, *case), case[6] == "causal")
        for case in CHECKS  # type: ignore
    ]
    sd35_step = (2, *SHAPES["SD 3.5 large, 1024 px"][1:])
    jobs += [
        lambda: run(sd35_step, True),
        lambda: gpu.check(bench.device, BF16),
        lambda: gpu.check(bench.device, FP16),
    ]
    return jobs


def markdown(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The tables of a page: what the documents quote."""
    text = (
        f"# {about['card']}\n\n" + ", ".join(f"{key} {value}" for key, value in about.items() if key != "card") + "\n"
    )
    for part in dict.fromkeys(row["part"] for row in rows):
        of_part = [row for row in rows if row["part"] == part]
        columns = list(dict.fromkeys(key for row in of_part for key in row if key != "part"))
        text += f"\n## {part}\n\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns) + "\n"
        for row in of_part:
            cells = [row.get(column, "") for column in columns]
            text += "| " + " | ".join(f"{x:.3g}" if isinstance(x, float) else str(x) for x in cells) + " |\n"
    loops = {row["shape"]: row.get("loop_forward") for row in rows if row["part"] == "loop"}
    ratios = [row for row in rows if row["part"] == "attention" and "mixed_forward" in row]
    if ratios:
        text += "\n## Ratios to SDPA, of graphs' replays\n\n"
        text += (
            "| | forward, cuDNN's | flash's | forward + backward, cuDNN's | flash's | loop by ours |\n|"
            + "---|" * 6
            + "\n"
        )
    for row in ratios:
        shown = [
            f"{row[f'mixed_{way}'] / row[f'{label}_{way}']:.2f}" if f"{label}_{way}" in row else ""
            for way in ("forward", "both")
            for label in ("cuDNN", "flash")
        ]
        loop = loops.get(row["shape"])
        shown.append(f"{loop / row['mixed_forward']:.1f}" if loop else "")
        text += f"| {row['shape']} | " + " | ".join(shown) + " |\n"
    return text


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480, help="after which no further part is begun")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--dry", action="store_true", help="run on a CPU, on tiny sizes")
    parser.add_argument("--warm", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.dry and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --dry runs the same code on a CPU, on tiny sizes")
    return args


if __name__ == "__main__":
    main(parse_args())
