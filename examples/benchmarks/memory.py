"""The memory that a run is said to take before its model is loaded, against what it takes.

    python examples/benchmarks/memory.py

Pipelines of random weights, with the layers of Stable Diffusion 1.5, and with fewer of those of Stable Diffusion XL
(the deepest transformers have 3 in the place of 10) and of FLUX.1 (1 + 3 blocks of 19 + 38, 2 of T5's 24), in their
full width. Each run is a process of its own, on the CPU. Expected is what the process held before, and what the plan
says; the peak is that of its resident memory, on Linux; that of a step is without the pages of files that were read.

Where there is a GPU, it is that one's memory, and the runs are others: SDXL at 1024 pixels and FLUX.1 at 512 and 1024,
whole but for T5, in bfloat16, with NF4 and with blocks offloaded; 32 GB are written to the disk for it.

    python examples/benchmarks/memory.py --expected

tells what runs on whole models take, from their configs alone: the table of docs/memory.md. Nothing is trained.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from report import current_memory, highest_memory, machine, peak_memory, peak_of_own_memory, write
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from coeff_diffusers.training.run import plan
from training import make_images
from training import make_pipeline as stable_diffusion

SMALL = ["--cache_latents", "--gradient_checkpointing"]
RUNS: dict[str, tuple[str, str, list[str]]] = {
    "sd": ("SD 1.5", "no", []),
    "sd-checkpointing": ("SD 1.5", "no", ["--gradient_checkpointing"]),
    "sd-every-2": ("SD 1.5", "no", ["--gradient_checkpointing", "--checkpoint_every", "2"]),
    "sd-batch-2": ("SD 1.5", "no", ["--cache_latents", "--train_batch_size", "2"]),
    "sd-nf4": ("SD 1.5", "no", [*SMALL, "--quantize", "bnb_nf4"]),
    "sd-lora": ("SD 1.5", "no", [*SMALL, "--no_coeff", "--lora_rank", "4"]),
    "sdxl": ("SDXL, small", "no", SMALL),
    "sdxl-nf4": ("SDXL, small", "no", [*SMALL, "--quantize", "bnb_nf4"]),
    "sdxl-whole": ("SDXL", "no", [*SMALL, "--quantize", "bnb_nf4", "--group_offload"]),
    "sdxl-whole-lora": (
        "SDXL",
        "no",
        [*SMALL, "--quantize", "bnb_nf4", "--group_offload", "--no_coeff", "--lora_rank", "4"],
    ),
    "sdxl-bf16": ("SDXL", "bf16", ["--resolution", "1024", *SMALL]),
    "sdxl-bf16-nf4": ("SDXL", "bf16", ["--resolution", "1024", *SMALL, "--quantize", "bnb_nf4"]),
    "sdxl-bf16-offload": ("SDXL", "bf16", ["--resolution", "1024", "--cache_latents", "--group_offload"]),
    **{
        f"flux-{side}{name}": ("FLUX.1", "bf16", ["--resolution", str(side), "--cache_latents", *flags])
        for side in (512, 1024)
        for name, flags in {
            "": ["--gradient_checkpointing"],
            "-nf4": ["--gradient_checkpointing", "--quantize", "bnb_nf4"],
            "-offload": ["--group_offload"],
            "-offload-nf4": ["--group_offload", "--offload_activations", "--quantize", "bnb_nf4"],
        }.items()
    },
    "flux": ("FLUX.1, small", "no", SMALL),
    "flux-nf4": ("FLUX.1, small", "no", [*SMALL, "--quantize", "bnb_nf4"]),
    "flux-int8": ("FLUX.1, small", "no", [*SMALL, "--quantize", "torchao_int8"]),
}

CPU = [name for name, (_, precision, _) in RUNS.items() if precision == "no"]
GPU = [name for name in RUNS if name not in CPU]

CHEAP = "--mixed_precision bf16 --train_batch_size 1 --gradient_accumulation_steps 4 --cache_latents"
EXPECTED = {
    "SD 1.5": [
        (512, "--train_batch_size 4"),
        (512, "--mixed_precision bf16 --train_batch_size 4 --cache_latents"),
        (512, f"{CHEAP} --gradient_checkpointing"),
    ],
    "SDXL": [
        (1024, CHEAP),
        (1024, f"{CHEAP} --gradient_checkpointing --checkpoint_every 2"),
        (1024, f"{CHEAP} --gradient_checkpointing"),
        (1024, f"{CHEAP} --gradient_checkpointing --quantize bnb_nf4"),
        (1024, f"{CHEAP} --group_offload"),
    ],
    "FLUX.1": [
        (512, f"{CHEAP} --gradient_checkpointing"),
        (1024, f"{CHEAP} --gradient_checkpointing"),
        (512, f"{CHEAP} --gradient_checkpointing --quantize torchao_int8"),
        (1024, f"{CHEAP} --gradient_checkpointing --quantize torchao_int8"),
        (512, f"{CHEAP} --gradient_checkpointing --quantize bnb_nf4"),
        (1024, f"{CHEAP} --gradient_checkpointing --quantize bnb_nf4"),
        (512, f"{CHEAP} --group_offload"),
        (1024, f"{CHEAP} --group_offload"),
        (1024, f"{CHEAP} --group_offload --offload_activations"),
        (1024, f"{CHEAP} --group_offload --offload_activations --quantize bnb_nf4"),
    ],
    "SD 3 medium": [(1024, f"{CHEAP} --gradient_checkpointing")],
    "PixArt-Sigma": [(1024, f"{CHEAP} --gradient_checkpointing")],
    "FLUX.2 [klein] 4B": [(1024, f"{CHEAP} --gradient_checkpointing")],
    "Qwen-Image": [(1024, f"{CHEAP} --gradient_checkpointing --quantize bnb_nf4")],
    "Z-Image": [(1024, f"{CHEAP} --gradient_checkpointing --quantize bnb_nf4")],
    "Sana 1.6B": [(1024, f"{CHEAP} --gradient_checkpointing")],
    "Lumina Image 2.0": [(1024, f"{CHEAP} --gradient_checkpointing")],
}


def expected(output: Path) -> None:
    """The table of what runs on whole models take."""
    lines = ["| model | pixels | flags | expected GiB | phases | TFLOP an image |", "|---|---|---|---|---|---|"]
    for model, runs in EXPECTED.items():
        with tempfile.TemporaryDirectory() as folder:
            write_configs(WHOLE[model](), Path(folder))
            for side, flags in runs:
                given = ["--resolution", str(side), *flags.split()]
                told, counts = plan_of(Path(folder), given, "cuda"), []
                with operations_counted(counts):  # which keeps tensors alive
                    plan_of(Path(folder), given, "cuda")
                each = counts[0] / (4 if "batch_size 4" in flags else 1) / 1e12
                phases = ", ".join(f"{phase.name} {phase.total / 2**30:.1f}" for phase in told.phases)
                lines.append(f"| {model} | {side} | `{flags}` | {told.peak / 2**30:.1f} | {phases} | {each:.1f} |")
                print(lines[-1], flush=True)
    write("\n".join(lines) + "\n", output)


@contextmanager
def operations_counted(counts: list[int]) -> Iterator[None]:
    """Inside, the floating point operations of the training step that a plan takes are put into the list."""
    of_step = plan._training_step

    def counting(*args: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            taken = of_step(*args)
        counts.append(counter.get_total_flops())
        return taken

    with mock.patch.object(plan, "_training_step", counting):
        yield


@register_flop_formula(torch.ops.coeff_diffusers.mixed_attention)
def forward_operations(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None) -> int:
    """Of two products, and of mixing the maps between them."""
    (B, H, T, D), (_, _, S, E) = query, value
    return 2 * B * H * T * S * (D + H + E)


@register_flop_formula(torch.ops.coeff_diffusers.mixed_attention_backward)
def backward_operations(grad_out: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None) -> int:
    """Of the scores again, the gradients of query, key, value and maps, and three times the mixing."""
    (B, H, T, D), (_, _, S, E) = query, value
    return 2 * B * H * T * S * (3 * D + 3 * H + 2 * E)


def write_configs(pipeline: Any, folder: Path) -> None:
    """A pipeline's folder without weights."""
    pipeline.save_config(folder)
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            (part.save_config if hasattr(part, "save_config") else part.config.save_pretrained)(folder / name)
        elif part is not None:
            part.save_pretrained(folder / name)


def plan_of(base: Path, flags: list[str], device: str = "cpu") -> Any:
    from coeff_diffusers.training import parse_settings
    from coeff_diffusers.training.families import find_family, find_quantization, pipeline_index
    from coeff_diffusers.training.run.plan import plan_run

    fixed = {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": base / "images",
        "instance_prompt": "a sks dog",
        "output_dir": base / "out",
    }
    settings = parse_settings([*(text for name, value in fixed.items() for text in (f"--{name}", str(value))), *flags])
    index = pipeline_index(settings)
    quantization = find_quantization(settings, index, False, torch.device("cpu"))
    precision = settings.mixed_precision or "no"
    return plan_run(find_family(settings, index), settings, index, precision, quantization, device_type=device)


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    lines = [
        f"{where}, {args.resolution} px where no flag says another; {machine()}",
        "",
        "| model | precision | flags | expected GB | peak GB | expected / peak | of a step | phase | seconds a step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for name in args.runs:
            model, precision, flags = RUNS[name]
            base = Path(folder) / f"{model}-{precision}"
            if not base.exists():
                given = [sys.executable, __file__, "--make", model, precision, str(base)]
                subprocess.run(given, check=True)
                make_images(base / "images", args.resolution)
            command = [sys.executable, __file__, "--threads", str(args.threads), "--resolution", str(args.resolution)]
            command += ["--steps", str(args.steps), "--measure", name, str(base)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            print(done.stdout)
            if done.returncode:  # of a card's memory: a result, too
                lines.append(f"| {model} | {precision} | `{' '.join(flags)}` | failed | | | | | |")
                continue
            r = json.loads(done.stdout.splitlines()[-1])
            lines.append(
                f"| {model} | {precision} | `{' '.join(flags)}` | {r['expected'] / 1024:.2f} | "
                f"{r['peak'] / 1024:.2f} | {r['expected'] / r['peak']:.2f} | {r['training'] / 1024:.2f} | "
                f"{r['phase']} | {r['seconds']:.2f} |"
            )
            write("\n".join(lines) + "\n", args.output)


def measure(name: str, base: Path, resolution: int, steps: int) -> dict[str, Any]:
    """Trains some steps in this process: MB expected and at the peak, of a GPU if there is one."""
    from coeff_diffusers.training import DreamBoothRun, parse_settings

    _, precision, flags = RUNS[name]
    fixed = {"resolution": resolution, "max_train_steps": steps, "mixed_precision": precision, "memory": "off"}
    given = [text for name, value in fixed.items() for text in (f"--{name}", str(value))]
    batch = [] if "--train_batch_size" in flags else ["--train_batch_size", "1"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    told = plan_of(base, [*given, *batch, *flags], device)
    print(told.text())
    places = {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": base / "images",
        "instance_prompt": "a sks dog",
        "output_dir": base / f"out-{name}",
    }
    where = [text for name, value in places.items() for text in (f"--{name}", str(value))]
    run = DreamBoothRun(parse_settings([*where, *given, *batch, *flags, "--seed", "0"]))
    times = []

    def load() -> None:
        run.load_model()
        run.add_adapters()
        run.encode_prompts()

    def train() -> None:
        times.append(time.perf_counter())
        times.extend(time.perf_counter() for _ in run.steps())

    before = 0.0 if device == "cuda" else current_memory()
    (loading, _), (peak, of_step) = (peaks(part, device) for part in (load, train))
    return {
        "expected": before + told.peak / 2**20,
        "peak": max(loading, peak),
        "training": of_step,
        "phase": max(told.phases, key=lambda phase: phase.total).name,
        "seconds": statistics.median([later - earlier for earlier, later in itertools.pairwise(times)][-3:]),
    }


def peaks(call: Callable[[], Any], device: str) -> tuple[float, float]:
    """MB at the peak of a call, and without the pages of files, which a GPU has none of."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() / 2**20,) * 2
    own = []
    peak_memory(lambda: own.append(peak_of_own_memory(call)))
    return highest_memory(), own[0]


def make(model: str, precision: str, folder: Path) -> None:
    """Writes the pipeline's folder."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    pipeline: Any = MODELS[model]()
    for part in pipeline.components.values():
        if isinstance(part, nn.Module) and any(p.is_meta for p in part.parameters()):
            part.to(dtype).to_empty(device="cpu")
            with torch.no_grad():
                for parameter in part.parameters():
                    parameter.uniform_(-0.02, 0.02)
    pipeline.to(dtype).save_pretrained(folder)


def on_meta(build: Callable[[], Any]) -> Any:
    with torch.device("meta"):
        return build()


def clip_tokenizer() -> CLIPTokenizer:
    letters = [*string.printable[:94], *(letter + "</w>" for letter in string.printable[:94])]
    vocabulary = {word: i for i, word in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def clip_config(**changes: Any) -> CLIPTextConfig:
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12} | changes
    return CLIPTextConfig(bos_token_id=0, eos_token_id=1, **sizes)


def vae(channels: int, **changes: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=channels,
        **changes,
    )


def stable_diffusion_xl(deepest: int = 10) -> StableDiffusionXLPipeline:
    second = clip_config(
        hidden_size=1280, intermediate_size=5120, num_attention_heads=20, num_hidden_layers=32, projection_dim=1280
    )
    unet = on_meta(
        lambda: UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, deepest),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    )
    return StableDiffusionXLPipeline(
        vae=vae(4, scaling_factor=0.13025),
        text_encoder=CLIPTextModel(clip_config()),
        text_encoder_2=on_meta(lambda: CLIPTextModelWithProjection(second)),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        add_watermarker=False,
    )


def flux(double: int = 19, single: int = 38, t5_layers: int = 24) -> FluxPipeline:
    return FluxPipeline(
        vae=flow_vae(),
        text_encoder=CLIPTextModel(clip_config()),
        text_encoder_2=t5_xxl(t5_layers),
        tokenizer=clip_tokenizer(),
        tokenizer_2=t5_tokenizer(),
        transformer=on_meta(
            lambda: FluxTransformer2DModel(num_layers=double, num_single_layers=single, guidance_embeds=True)
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


def t5_xxl(layers: int = 24) -> Any:
    sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64, "feed_forward_proj": "gated-gelu"}
    return on_meta(lambda: T5EncoderModel(T5Config(num_layers=layers, use_cache=False, **sizes)))


def t5_tokenizer() -> T5Tokenizer:
    pieces = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>")]
    pieces += [(letter, -2.0) for letter in "▁" + string.printable[:94]]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def word_tokenizer() -> Any:
    """A token a word, about as many as the published tokenizers make of templates and short prompts."""
    tokenizer = Tokenizer(WordLevel({"<unk>": 0, "<pad>": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    template = "{% for each in messages %}<|im_start|>{{ each.role }} {{ each.content }}<|im_end|>{% endfor %}"
    special: dict[str, Any] = {"unk_token": "<unk>", "pad_token": "<pad>", "chat_template": template}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=131072, **special)


def flow_vae() -> AutoencoderKL:
    return vae(16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)


def qwen3(kind: type[nn.Module]) -> Any:
    config = Qwen3Config(
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
        max_position_embeddings=40960,
    )
    return on_meta(lambda: kind(config))


def gemma2() -> Any:
    return on_meta(lambda: Gemma2Model(Gemma2Config()))  # whose defaults are those of 2B


def stable_diffusion_3() -> StableDiffusion3Pipeline:
    first = clip_config(projection_dim=768)
    second = clip_config(
        hidden_size=1280, intermediate_size=5120, num_attention_heads=20, num_hidden_layers=32, projection_dim=1280
    )
    transformer = on_meta(
        lambda: SD3Transformer2DModel(
            num_layers=24,
            num_attention_heads=24,
            caption_projection_dim=1536,
            pos_embed_max_size=192,
        )
    )
    return StableDiffusion3Pipeline(
        vae=vae(16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=on_meta(lambda: CLIPTextModelWithProjection(first)),
        text_encoder_2=on_meta(lambda: CLIPTextModelWithProjection(second)),
        text_encoder_3=t5_xxl(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=t5_tokenizer(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def pixart_sigma() -> PixArtSigmaPipeline:
    sizes = {"caption_channels": 4096, "sample_size": 128, "use_additional_conditions": False}
    return PixArtSigmaPipeline(
        vae=vae(4, scaling_factor=0.13025),
        text_encoder=t5_xxl(),
        tokenizer=t5_tokenizer(),
        transformer=on_meta(lambda: PixArtTransformer2DModel(**sizes)),
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02),
    )


def flux2_klein() -> Flux2KleinPipeline:
    sizes = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}
    return Flux2KleinPipeline(
        vae=AutoencoderKLFlux2(),
        text_encoder=qwen3(Qwen3ForCausalLM),
        tokenizer=word_tokenizer(),
        transformer=on_meta(lambda: Flux2Transformer2DModel(guidance_embeds=False, **sizes)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


def qwen_image() -> QwenImagePipeline:
    text = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return QwenImagePipeline(
        vae=AutoencoderKLQwenImage(),
        text_encoder=on_meta(lambda: Qwen2_5_VLForConditionalGeneration(config)),
        tokenizer=word_tokenizer(),
        transformer=on_meta(QwenImageTransformer2DModel),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def z_image() -> ZImagePipeline:
    return ZImagePipeline(
        vae=flow_vae(),
        text_encoder=qwen3(Qwen3Model),
        tokenizer=word_tokenizer(),
        transformer=on_meta(ZImageTransformer2DModel),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def sana() -> SanaPipeline:
    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    return SanaPipeline(
        vae=AutoencoderDC(encoder_block_types=blocks, decoder_block_types=blocks, scaling_factor=0.41407),
        text_encoder=gemma2(),
        tokenizer=word_tokenizer(),
        transformer=on_meta(SanaTransformer2DModel),
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )


def lumina2() -> Lumina2Pipeline:
    return Lumina2Pipeline(
        vae=flow_vae(),
        text_encoder=gemma2(),
        tokenizer=word_tokenizer(),
        transformer=on_meta(lambda: Lumina2Transformer2DModel(cap_feat_dim=2304)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
    )


MODELS: dict[str, Callable[[], DiffusionPipeline]] = {
    "FLUX.1": lambda: flux(t5_layers=2),
    "SD 1.5": stable_diffusion,
    "SDXL": stable_diffusion_xl,
    "SDXL, small": lambda: stable_diffusion_xl(3),
    "FLUX.1, small": lambda: flux(1, 3, 2),
}
WHOLE: dict[str, Callable[[], DiffusionPipeline]] = {
    "SD 1.5": stable_diffusion,
    "SDXL": stable_diffusion_xl,
    "FLUX.1": flux,
    "SD 3 medium": stable_diffusion_3,
    "PixArt-Sigma": pixart_sigma,
    "FLUX.2 [klein] 4B": flux2_klein,
    "Qwen-Image": qwen_image,
    "Z-Image": z_image,
    "Sana 1.6B": sana,
    "Lumina Image 2.0": lumina2,
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=GPU if torch.cuda.is_available() else CPU)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4 if torch.cuda.is_available() else 1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", help="for the pipelines, some 24 GB; that of temporary files if not given")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/memory.md"))
    parser.add_argument("--expected", action="store_true", help="of whole models, whose runs are not made")
    parser.add_argument("--measure", nargs=2, metavar=("RUN", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--make", nargs=3, metavar=("MODEL", "PRECISION", "FOLDER"), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_args()
    if arguments.make:
        make(*arguments.make[:2], Path(arguments.make[2]))
    elif arguments.expected:
        expected(arguments.output)
    elif arguments.measure:
        torch.set_num_threads(arguments.threads)
        print(
            json.dumps(
                measure(arguments.measure[0], Path(arguments.measure[1]), arguments.resolution, arguments.steps)
            )
        )
    else:
        main(arguments)
