"""Trains the tiny Stable Diffusion of this folder from nothing, out of the npm package `emoji-datasource-google`.

    ACCELERATE_USE_CPU=true python -m torch.distributed.run --nproc_per_node 2 examples/emoji/pretrain.py

or plain `python examples/emoji/pretrain.py`, in one process and with as many steps of half the batch.

Stages: an autoencoder on glyphs of all kinds; a tokenizer; a cache of encoded scenes; text encoder and UNet together;
the pipeline in diffusers' format. Each writes checkpoints to `--work_dir` and goes on where it was when it is started
again. `--stop_after vae` or the like stops early. Subjects for personalisation (`scenes.SUBJECTS`) are never shown.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file, save_file
from scenes import BACKGROUNDS, GLYPHS, IMAGE_SIZE, PLACES, SIZES, SUBJECTS, Scene, draw_scene, load_glyphs, render
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

PACKAGE = "emoji-datasource-google@16.0.0"
HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every field is a flag."""

    emoji_package: str = ""  # folder of the unpacked npm package; fetched with npm if empty
    work_dir: str = str(HERE / "work")
    output_dir: str = str(HERE / "model")
    stop_after: str = "export"  # vae, cache, unet or export
    seed: int = 0
    vae_steps: int = 3500
    vae_batch_size: int = 8  # a process
    vae_learning_rate: float = 2e-3
    kl_weight: float = 1e-6
    unet_steps: int = 13500
    unet_batch_size: int = 16  # a process
    unet_learning_rate: float = 1e-3
    first_glyphs: int = 40  # the curriculum begins with so many
    first_steps: int = 6500
    decay_fraction: float = 0.3  # of the steps, at their end, over which the rate falls to 0
    caption_dropout: float = 0.1
    checkpointing_steps: int = 500


def main(settings: Settings) -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")  # batches are not moved to a device
    torch.manual_seed(settings.seed)
    work = Path(settings.work_dir)
    work.mkdir(parents=True, exist_ok=True)
    with accelerator.main_process_first():
        package = Path(settings.emoji_package or fetch_package(work))
    for name, stage in STAGES.items():
        stage(settings, accelerator, package, work)
        accelerator.wait_for_everyone()
        if name == settings.stop_after:
            break


def fetch_package(folder: Path) -> Path:
    """The npm package, unpacked in `folder`; fetched if it is not there."""
    if not (folder / "package").exists():
        if shutil.which("npm") is None:
            raise SystemExit(f"npm is needed to fetch {PACKAGE}; or unpack it yourself and name it: --emoji_package")
        subprocess.run(["npm", "pack", PACKAGE, "--silent"], cwd=folder, check=True)
        subprocess.run(["tar", "xzf", f"{PACKAGE.replace('@', '-')}.tgz"], cwd=folder, check=True)
    return folder / "package"


# ------------------------------------------------------------------------------------------------------ autoencoder


def new_vae() -> AutoencoderKL:
    """8 channels at a quarter of the resolution. Starts as a linear map without noise, which learns much sooner."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        shift_factor=0.0,  # as flow-matching pipelines ask for
    )
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.orthogonal_(module.weight)
            nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
    with torch.no_grad():
        vae.quant_conv.weight[8:] = 0
        vae.quant_conv.bias[8:] = -6  # the logarithm of the latents' variance
    return vae


def train_vae(settings: Settings, accelerator: Accelerator, package: Path, work: Path) -> None:
    """Reconstructs glyphs of every kind, at any size and place, on any colour."""
    torch.manual_seed(settings.seed)
    vae = new_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=settings.vae_learning_rate, weight_decay=1e-4, fused=True)
    step = load_checkpoint(work / "vae.pt", vae=vae, optimizer=optimizer)
    if step == settings.vae_steps:
        return
    module, optimizer = accelerator.prepare(Autoencoding(vae), optimizer)
    rng = random.Random(settings.seed * 1000 + step * 10 + accelerator.process_index)
    glyphs = list(all_glyphs(package).values())
    progress = tqdm(total=settings.vae_steps, initial=step, desc="vae", disable=not accelerator.is_main_process)
    while step < settings.vae_steps:
        set_rate(optimizer, settings.vae_learning_rate * schedule(step, settings.vae_steps, 0.5))
        images = to_tensor([random_image(rng, glyphs) for _ in range(settings.vae_batch_size)])
        loss, error = module(images, settings.kl_weight)
        step_optimizer(accelerator, module, optimizer, loss)
        step += 1
        progress.update()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}", psnr=f"{-10 * math.log10(error.item() / 4):.2f} dB")
        if step % settings.checkpointing_steps == 0 or step == settings.vae_steps:
            save_checkpoint(accelerator, work / "vae.pt", step, vae=vae, optimizer=optimizer)


class Autoencoding(nn.Module):
    """The loss of the autoencoder: absolute and squared error, and a little KL divergence."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor, kl_weight: float) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(images).latent_dist
        decoded = self.vae.decode(posterior.sample()).sample.float()
        error = F.mse_loss(decoded, images)
        loss = F.l1_loss(decoded, images) + error + kl_weight * posterior.kl().mean()
        return loss, error.detach()


def all_glyphs(package: Path) -> dict[str, Image.Image]:
    """Every glyph of the package but the held-out subjects."""
    entries = json.loads((package / "emoji.json").read_text())
    names = {entry["short_name"] for entry in entries if entry["has_img_google"]} - set(SUBJECTS.values())
    return load_glyphs(package, {name: name for name in sorted(names)})


def random_image(rng: random.Random, glyphs: list[Image.Image]) -> Image.Image:
    colour = rng.choice(list(BACKGROUNDS.values()))
    if rng.random() < 0.3:
        colour = tuple(rng.randrange(256) for _ in range(3))
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), colour)
    pixels = rng.randint(26, 60)
    glyph = rng.choice(glyphs).resize((pixels, pixels), Image.Resampling.LANCZOS)
    image.paste(glyph, (rng.randint(-4, 68 - pixels), rng.randint(-4, 68 - pixels)), glyph)
    return image


def to_tensor(images: list[Image.Image]) -> Tensor:
    """(N, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


# ------------------------------------------------------------------------------------------------------------ cache


def cache_latents(settings: Settings, accelerator: Accelerator, package: Path, work: Path) -> None:
    """Every size, place and background of every glyph; and the tokenizer.

    No shifts by single pixels: the places are whole latent cells apart, so that a glyph of a size has one encoding,
    which the UNet learns much sooner than all the ways in which a glyph can lie on the grid.
    """
    if accelerator.is_main_process and not (work / "tokenizer").exists():
        new_tokenizer(package).save_pretrained(work / "tokenizer")
    if (work / "latents.pt").exists() or not accelerator.is_main_process:
        return
    vae = new_vae()
    load_checkpoint(work / "vae.pt", vae=vae)
    scenes = [scene for words in GLYPHS for scene in all_scenes(words)]
    with torch.autocast("cpu", torch.bfloat16):
        stacked = encode_scenes(vae.eval(), scenes, load_glyphs(package, GLYPHS))
    mean, std = stacked.float().mean((0, 2, 3)), stacked.float().std((0, 2, 3))
    normalised = ((stacked.float() - mean[:, None, None]) / std[:, None, None]).half()
    content = {"latents": normalised, "mean": mean, "std": std, "scenes": [dataclasses.astuple(s) for s in scenes]}
    save_whole(content, work / "latents.pt")


@torch.no_grad()
def encode_scenes(vae: AutoencoderKL, scenes: list[Scene], glyphs: dict[str, Image.Image]) -> Tensor:
    """(N, 8, 16, 16) in float16."""
    latents = []
    for start in tqdm(range(0, len(scenes), 64), desc="latents"):
        batch = [render(scene, glyphs[scene.words]) for scene in scenes[start : start + 64]]
        latents.append(vae.encode(to_tensor(batch)).latent_dist.mode())
    return torch.cat(latents).half()


def all_scenes(words: str) -> list[Scene]:
    return [
        Scene(words, background, size, place)
        for background in BACKGROUNDS
        for size in SIZES
        for place in PLACES
        if size != "large" or place == ""
    ]


# -------------------------------------------------------------------------------------------- text encoder and UNet


def new_tokenizer(package: Path, max_length: int = 24) -> CLIPTokenizer:
    """Byte-pair encoding in CLIP's format, of the captions' words and of the names and keywords of all emoji."""
    entries = json.loads((package / "emoji.json").read_text())
    other = [" ".join([entry["name"] or "", *entry["short_names"]]).replace("_", " ") for entry in entries]
    captions = [Scene(words, b, s, p).caption for words in GLYPHS for b in BACKGROUNDS for s in SIZES for p in PLACES]
    subjects = [f"a {words}" for words in SUBJECTS for _ in range(50)]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(captions + subjects + other + ["sks"] * 1000, trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in learned["merges"]]
    return CLIPTokenizer(vocab=learned["vocab"], merges=merges, model_max_length=max_length)


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            projection_dim=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 4,
        in_channels=8,
        out_channels=8,
        block_out_channels=(48, 96, 144),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=(8, 16, 24),  # diffusers' name for the number of heads
        norm_num_groups=16,
    )


def new_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


class Denoising(nn.Module):
    """The loss of UNet and text encoder: the error of the predicted velocity."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder
        self.scheduler = new_scheduler()

    def forward(self, latents: Tensor, input_ids: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        target = self.scheduler.get_velocity(latents, noise, timesteps)
        predicted = self.unet(noisy, timesteps, self.text_encoder(input_ids)[0]).sample
        return F.mse_loss(predicted.float(), target)


class ExplicitAttnProcessor:
    """Softmax written out: at 64 tokens and in bfloat16 twice as fast on a CPU, backward, as the fused call."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **unused: Any
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            layer(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        maps = torch.softmax(query @ key.mT * attn.scale, dim=-1)
        return attn.to_out[0]((maps.to(value.dtype) @ value).transpose(1, 2).flatten(2))


def train_unet(settings: Settings, accelerator: Accelerator, package: Path, work: Path) -> None:
    torch.manual_seed(settings.seed)
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    module = Denoising(new_unet(), new_text_encoder(tokenizer))
    module.unet.set_attn_processor(ExplicitAttnProcessor())
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=settings.unet_learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    ema = EMAModel(module.parameters(), decay=0.9995, use_ema_warmup=True, power=0.75, foreach=True)
    step = load_checkpoint(work / "unet.pt", module=module, optimizer=optimizer, ema=ema)
    if step >= settings.unet_steps:
        return
    wrapped, optimizer = accelerator.prepare(module, optimizer)
    seed = settings.seed * 1000 + step * 10 + accelerator.process_index
    torch.manual_seed(seed)
    batches = scene_batches(settings, tokenizer, work, random.Random(seed), step)
    progress = tqdm(total=settings.unet_steps, initial=step, desc="unet", disable=not accelerator.is_main_process)
    average = None
    while step < settings.unet_steps:
        rate = settings.unet_learning_rate * schedule(step, settings.unet_steps, settings.decay_fraction)
        set_rate(optimizer, rate)
        latents, input_ids = next(batches)
        loss = wrapped(latents, input_ids, stratified_timesteps(len(latents)), torch.randn_like(latents))
        step_optimizer(accelerator, wrapped, optimizer, loss)
        ema.step(module.parameters())
        step += 1
        progress.update()
        average = loss.item() if average is None else 0.99 * average + 0.01 * loss.item()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{average:.4f}", rate=f"{rate:.1e}")
        if step % settings.checkpointing_steps == 0 or step == settings.unet_steps:
            save_checkpoint(accelerator, work / "unet.pt", step, module=module, optimizer=optimizer, ema=ema)


def scene_batches(
    settings: Settings, tokenizer: CLIPTokenizer, work: Path, rng: random.Random, step: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(latents, input_ids) of scenes drawn evenly over the glyphs; some captions are dropped for guidance."""
    cache = torch.load(work / "latents.pt")
    captions = [Scene(*fields).caption for fields in cache["scenes"]]
    input_ids = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    empty = tokenizer("", padding="max_length", return_tensors="pt").input_ids[0]
    index = {tuple(fields): i for i, fields in enumerate(cache["scenes"])}
    while True:
        first = settings.first_glyphs if step < settings.first_steps else None
        drawn = draw_scenes(rng, settings.unet_batch_size, first)
        chosen = torch.tensor([index[dataclasses.astuple(scene)] for scene in drawn])
        ids = input_ids[chosen].clone()
        ids[torch.rand(len(ids)) < settings.caption_dropout] = empty
        yield cache["latents"][chosen].float(), ids
        step += 1


def draw_scenes(rng: random.Random, count: int, first_glyphs: int | None = None) -> list[Scene]:
    """Of glyphs drawn evenly from all, or from so many that come first."""
    among = list(GLYPHS)[:first_glyphs]
    return [draw_scene(rng.choice(among), rng) for _ in range(count)]


def stratified_timesteps(count: int) -> Tensor:
    """One from each of `count` parts of the 1,000 steps, so that a batch's loss varies less.

    The density grows with the noise, where it is decided what is in the image and where.
    """
    return (((torch.arange(count) + torch.rand(count)) / count).sqrt() * 1000).long().clamp(max=999)


# ----------------------------------------------------------------------------------------------------------- export


def export(settings: Settings, accelerator: Accelerator, package: Path, work: Path) -> None:
    """The averaged weights as a `StableDiffusionPipeline` of float16 safetensors."""
    if not accelerator.is_main_process:
        return
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    module = Denoising(new_unet(), new_text_encoder(tokenizer))
    ema = EMAModel(module.parameters())
    load_checkpoint(work / "unet.pt", module=module, ema=ema)
    ema.copy_to(module.parameters())
    vae = new_vae()
    load_checkpoint(work / "vae.pt", vae=vae)
    fold_normalisation(vae, torch.load(work / "latents.pt"))
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=module.text_encoder,
        tokenizer=tokenizer,
        unet=module.unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    output = Path(settings.output_dir)
    temporary = Path(tempfile.mkdtemp(dir=output.parent))
    pipe.to(torch.float16).save_pretrained(temporary)
    load_as_float32(temporary / "text_encoder" / "config.json")
    name_as_older_releases(temporary / "text_encoder" / "model.safetensors")
    shutil.copytree(temporary, output, dirs_exist_ok=True)
    shutil.rmtree(temporary)
    print(f"wrote {output}, {sum(f.stat().st_size for f in output.rglob('*') if f.is_file()) / 1e6:.1f} MB")


def load_as_float32(config: Path) -> None:
    """transformers loads what the config says where diffusers loads float32; the two must agree."""
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}, indent=2) + "\n")


def name_as_older_releases(weights: Path) -> None:
    """With the prefix that CLIP's keys once had: newer releases of transformers read both, older ones this alone."""
    tensors = load_file(weights)
    named = {f"text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in tensors.items()}
    save_file(named, weights, {"format": "pt"})


def fold_normalisation(vae: AutoencoderKL, cache: dict[str, Any]) -> None:
    """Builds the cache's normalisation into the 1 x 1 convolutions round the latents: mean 0, deviation 1."""
    mean, std = cache["mean"], cache["std"]
    scale = torch.cat([1 / std, torch.ones_like(std)])
    shift = torch.cat([-mean / std, -2 * std.log()])
    with torch.no_grad():
        vae.quant_conv.weight.mul_(scale[:, None, None, None])
        vae.quant_conv.bias.mul_(scale).add_(shift)
        vae.post_quant_conv.bias.add_(vae.post_quant_conv.weight[:, :, 0, 0] @ mean)
        vae.post_quant_conv.weight.mul_(std[None, :, None, None])


# ----------------------------------------------------------------------------------------------------------- common


def schedule(step: int, steps: int, decay_fraction: float, warmup: int = 200) -> float:
    """Warm-up, constant, and a straight line to 0 over the last part."""
    return min((step + 1) / warmup, 1.0, (steps - step) / max(1, decay_fraction * steps))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def step_optimizer(accelerator: Accelerator, module: nn.Module, optimizer: Any, loss: Tensor) -> None:
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def save_checkpoint(accelerator: Accelerator, path: Path, step: int, **parts: Any) -> None:
    if accelerator.is_main_process:
        save_whole({"step": step, **{name: part.state_dict() for name, part in parts.items()}}, path)


def load_checkpoint(path: Path, **parts: Any) -> int:
    """Loads what there is and returns the step it was written at, 0 if there is no checkpoint."""
    if not path.exists():
        return 0
    content = torch.load(path)
    for name, part in parts.items():
        part.load_state_dict(content[name])
    return int(content["step"])


def save_whole(content: dict[str, Any], path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(content, temporary)
    os.replace(temporary, path)


STAGES = {"vae": train_vae, "cache": cache_latents, "unet": train_unet, "export": export}


def parse_args(kind: type[Any], description: str | None, **choices: list[str]) -> Any:
    """The settings on the command line: every field of the dataclass `kind` is a flag."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(kind):
        allowed = choices.get(field.name)
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default, choices=allowed)
    return kind(**vars(parser.parse_args()))


if __name__ == "__main__":
    main(parse_args(Settings, __doc__, stop_after=list(STAGES)))
