"""Trains a transformer on the scenes of this folder by flow matching, with the autoencoder and the text encoder of
`model/` as they are: a Stable Diffusion 3 in small.

    OMP_NUM_THREADS=2 python examples/emoji/pretrain_dit.py

Stages: a cache of latents and of prompt embeddings; the transformer; the pipeline in diffusers' format, with copies
of what it shares with `model/`. It writes checkpoints to `--work_dir` and goes on where it was when it is started
again, to the bit: everything random about a step follows from its number. Without a checkpoint it goes on from the
weights in `--output_dir`, if there are any, with a fresh optimizer. `--stop_after train` leaves them as they are.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.training_utils import EMAModel
from pretrain import (
    all_scenes,
    draw_scenes,
    encode_scenes,
    fetch_package,
    load_as_float32,
    load_checkpoint,
    parse_args,
    save_checkpoint,
    save_whole,
    schedule,
    set_rate,
    step_optimizer,
)
from safetensors.torch import load_file, save_file
from scenes import GLYPHS, IMAGE_SIZE, load_glyphs
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

HERE = Path(__file__).parent
LONGEST = 256  # default of the pipeline's max_sequence_length
WARMUP = 200  # steps of an optimizer that begins, also on weights that were trained before


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every field is a flag."""

    emoji_package: str = ""  # folder of the unpacked npm package; fetched with npm if empty
    base_dir: str = str(HERE / "model")  # of the autoencoder, the text encoder and the tokenizer
    work_dir: str = str(HERE / "work")
    output_dir: str = str(HERE / "model_dit")
    stop_after: str = "export"  # cache, train or export
    seed: int = 0
    num_layers: int = 3
    num_attention_heads: int = 8  # of width 32
    patch_size: int = 2
    steps: int = 27000
    batch_size: int = 16
    learning_rate: float = 1.5e-3
    first_glyphs: int = 40  # the curriculum begins with so many
    first_steps: int = 1200
    decay_fraction: float = 0.25  # of the steps, at their end, over which the rate falls to 0
    caption_dropout: float = 0.1
    checkpointing_steps: int = 250


def main(settings: Settings) -> None:
    work = Path(settings.work_dir)
    work.mkdir(parents=True, exist_ok=True)
    pipe = new_pipeline(settings)
    cache_scenes(settings, pipe, work)
    if settings.stop_after != "cache":
        train(settings, pipe.transformer, work)
    if settings.stop_after == "export":
        export(settings, pipe, work)


# --------------------------------------------------------------------------------------------------------- pipeline


def new_pipeline(settings: Settings) -> StableDiffusion3Pipeline:
    """With an untrained transformer. Both of the pipeline's CLIPs are the one of `base_dir`, and it has no T5."""
    base = Path(settings.base_dir)
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    text_encoder = load_text_encoder(base / "text_encoder")
    torch.manual_seed(settings.seed)
    return StableDiffusion3Pipeline(
        transformer=new_transformer(settings, text_encoder.config),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL.from_pretrained(base / "vae").eval(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def load_text_encoder(folder: Path) -> CLIPTextModelWithProjection:
    """The CLIPTextModel in `folder` in the class that the pipeline asks for, with the identity for its projection."""
    config = CLIPTextConfig.from_pretrained(folder)
    tensors = load_file(folder / "model.safetensors") | {"text_projection.weight": torch.eye(config.projection_dim)}
    return CLIPTextModelWithProjection.from_pretrained(None, config=config, state_dict=tensors).eval()


def new_transformer(settings: Settings, text: CLIPTextConfig) -> SD3Transformer2DModel:
    """As DiTs are initialised: every block begins as the identity."""
    width = 32 * settings.num_attention_heads
    transformer = SD3Transformer2DModel(
        sample_size=IMAGE_SIZE // 4,
        patch_size=settings.patch_size,
        in_channels=8,
        out_channels=8,
        num_layers=settings.num_layers,
        attention_head_dim=32,
        num_attention_heads=settings.num_attention_heads,
        joint_attention_dim=2 * text.hidden_size,
        caption_projection_dim=width,
        pooled_projection_dim=2 * text.projection_dim,
        pos_embed_max_size=IMAGE_SIZE // 4 // settings.patch_size,
        qk_norm="rms_norm",
    )
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if name == "proj_out" or ("norm" in name and name.endswith(".linear")):  # what modulates a block
                nn.init.zeros_(module.weight)
    return transformer


# ------------------------------------------------------------------------------------------------------------ cache


@torch.no_grad()
def cache_scenes(settings: Settings, pipe: StableDiffusion3Pipeline, work: Path) -> None:
    """Latents of every scene and the embeddings of its caption; after them those of the empty one."""
    if (work / "scenes.pt").exists():
        return
    glyphs = load_glyphs(Path(settings.emoji_package or fetch_package(work)), GLYPHS)
    scenes = [scene for words in GLYPHS for scene in all_scenes(words)]
    captions = [*(scene.caption for scene in scenes), ""]
    encoded = []
    for start in tqdm(range(0, len(captions), 256), desc="captions"):
        part = captions[start : start + 256]
        embeds, _, pooled, _ = pipe.encode_prompt(
            part, None, None, do_classifier_free_guidance=False, max_sequence_length=1
        )
        encoded.append((embeds.half(), pooled.half()))
    prompt_embeds, pooled = (torch.cat(parts) for parts in zip(*encoded))
    content = {
        "latents": encode_scenes(pipe.vae, scenes, glyphs),
        "prompt_embeds": prompt_embeds,
        "pooled": pooled,
        "scenes": [dataclasses.astuple(scene) for scene in scenes],
    }
    save_whole(content, work / "scenes.pt")


# --------------------------------------------------------------------------------------------------------- training


class RepeatedTokenAttnProcessor:
    """Joint attention in which the last token stands for `repeats` equal ones, with the softmax written out.

    A pipeline without T5 puts `max_sequence_length` zero vectors behind CLIP's embeddings. Text has no positions in
    the transformer, so they stay equal to one another, and n equal keys are one whose logit is greater by log n.
    """

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, repeats: Tensor, **unused: Any
    ) -> tuple[Tensor, Tensor]:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        image, text = hidden_states, encoder_hidden_states
        query = torch.cat([attn.norm_q(heads(attn.to_q(image))), attn.norm_added_q(heads(attn.add_q_proj(text)))], 2)
        key = torch.cat([attn.norm_k(heads(attn.to_k(image))), attn.norm_added_k(heads(attn.add_k_proj(text)))], 2)
        value = torch.cat([heads(attn.to_v(image)), heads(attn.add_v_proj(text))], 2)
        bias = F.pad(repeats.log()[:, None, None, None], (key.shape[2] - 1, 0))
        maps = torch.softmax(torch.add(bias, query @ key.mT, alpha=attn.scale), dim=-1)
        mixed = (maps @ value).transpose(1, 2).flatten(2)
        image, text = mixed[:, : image.shape[1]], mixed[:, image.shape[1] :]
        return attn.to_out[0](image), text if attn.context_pre_only else attn.to_add_out(text)


def train(settings: Settings, transformer: SD3Transformer2DModel, work: Path) -> None:
    """To `steps`, from the checkpoint in `work`, else from the weights in `output_dir`, else from nothing."""
    accelerator = Accelerator(cpu=True)
    step = load_exported(transformer, Path(settings.output_dir))
    transformer.set_attn_processor(RepeatedTokenAttnProcessor())
    optimizer = torch.optim.AdamW(
        transformer.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    ema = EMAModel(transformer.parameters(), decay=0.9995, use_ema_warmup=True, power=0.75, foreach=True)
    parts = {"transformer": transformer, "optimizer": optimizer, "ema": ema}
    step = load_checkpoint(work / "dit.pt", **parts) or step
    cache = torch.load(work / "scenes.pt")
    index = {tuple(fields): i for i, fields in enumerate(cache["scenes"])}
    progress = tqdm(total=settings.steps, initial=step, desc="dit")
    average = None
    while step < settings.steps:
        share = schedule(step, settings.steps, settings.decay_fraction)
        rate = settings.learning_rate * min(share, (ema.optimization_step + 1) / WARMUP)
        set_rate(optimizer, rate)
        loss = flow_loss(transformer, **draw_batch(settings, cache, index, step))
        step_optimizer(accelerator, transformer, optimizer, loss)
        ema.step(transformer.parameters())
        step += 1
        progress.update()
        average = loss.item() if average is None else 0.99 * average + 0.01 * loss.item()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{average:.4f}", rate=f"{rate:.1e}")
        if step % settings.checkpointing_steps == 0 or step == settings.steps:
            save_checkpoint(accelerator, work / "dit.pt", step, **parts)


def draw_batch(
    settings: Settings, cache: dict[str, Any], index: dict[tuple[str, ...], int], step: int
) -> dict[str, Tensor]:
    """The arguments of [`flow_loss`] at a step."""
    rng = random.Random(f"{settings.seed} {step}")
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    count = settings.batch_size
    scenes = draw_scenes(rng, count, settings.first_glyphs if step < settings.first_steps else None)
    chosen = torch.tensor([index[dataclasses.astuple(scene)] for scene in scenes])
    told = chosen.clone()
    told[torch.rand(count, generator=generator) < settings.caption_dropout] = len(index)  # the empty caption
    latents = cache["latents"][chosen].float()
    return {
        "latents": latents,
        "prompt_embeds": cache["prompt_embeds"][told].float(),
        "pooled": cache["pooled"][told].float(),
        "noise": torch.randn(latents.shape, generator=generator),
        "places": (torch.arange(count) + torch.rand(count, generator=generator)) / count,
        "repeats": LONGEST ** torch.rand(count, generator=generator),
    }


def flow_loss(
    transformer: nn.Module,
    latents: Tensor,
    prompt_embeds: Tensor,
    pooled: Tensor,
    noise: Tensor,
    places: Tensor,
    repeats: Tensor,
) -> Tensor:
    """The squared error of the velocity, noise - latents.

    sigma = 3 places / (1 + 2 places), the shift by 3 of the scheduler: as many steps of training where an image is
    made as steps of inference.
    """
    sigmas = 3 * places / (1 + 2 * places)
    spread = sigmas[:, None, None, None]
    predicted = transformer(
        hidden_states=(1 - spread) * latents + spread * noise,
        timestep=1000 * sigmas,
        encoder_hidden_states=prompt_embeds,
        pooled_projections=pooled,
        joint_attention_kwargs={"repeats": repeats},
    ).sample
    return F.mse_loss(predicted, noise - latents)


# ----------------------------------------------------------------------------------------------------------- export


def load_exported(transformer: SD3Transformer2DModel, output: Path) -> int:
    """Loads the weights in the pipeline in `output` and returns their step; 0 if it has none."""
    if not (output / "training.json").exists():
        return 0
    transformer.load_state_dict(load_file(output / "transformer" / "diffusion_pytorch_model.safetensors"))
    return int(json.loads((output / "training.json").read_text())["step"])


def export(settings: Settings, pipe: StableDiffusion3Pipeline, work: Path) -> None:
    """The averaged weights as a `StableDiffusion3Pipeline`, in float16; the rest of it is copied from `base_dir`."""
    transformer, output = pipe.transformer, Path(settings.output_dir)
    ema = EMAModel(transformer.parameters())
    step = load_checkpoint(work / "dit.pt", ema=ema)
    ema.copy_to(transformer.parameters())
    transformer.half().save_pretrained(output / "transformer")
    pipe.scheduler.save_pretrained(output / "scheduler")
    pipe.save_config(output)
    base = Path(settings.base_dir)
    export_text_encoder(pipe.text_encoder, base, output / "text_encoder")
    copies = {"vae": base / "vae", "tokenizer": base / "tokenizer", "tokenizer_2": base / "tokenizer"}
    for name, source in (copies | {"text_encoder_2": output / "text_encoder"}).items():
        shutil.copytree(source, output / name, dirs_exist_ok=True)
    (output / "training.json").write_text(json.dumps({"step": step}, indent=2) + "\n")


def export_text_encoder(encoder: CLIPTextModelWithProjection, base: Path, folder: Path) -> None:
    """Of two shards: the file in `base`, and the projection that the class of the pipeline's encoders has besides."""
    encoder.config.save_pretrained(folder)
    load_as_float32(folder / "config.json")
    shutil.copyfile(base / "text_encoder" / "model.safetensors", folder / "encoder.safetensors")
    projection = {"text_projection.weight": encoder.text_projection.weight.detach().half()}
    save_file(projection, folder / "projection.safetensors", {"format": "pt"})
    keys = dict.fromkeys(load_file(folder / "encoder.safetensors"), "encoder.safetensors")
    keys |= dict.fromkeys(projection, "projection.safetensors")
    size = sum((folder / file).stat().st_size for file in set(keys.values()))
    index = {"metadata": {"total_size": size}, "weight_map": keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


if __name__ == "__main__":
    main(parse_args(Settings, __doc__, stop_after=["cache", "train", "export"]))
