"""Measures a model of this folder: is the asked-for glyph there, on the asked-for background?

    python examples/emoji/evaluate.py --json examples/emoji/model/evaluation.json --grid examples/emoji/grid.png
    python examples/emoji/evaluate.py --model examples/emoji/model_dit --json examples/emoji/model_dit/evaluation.json

The background is right if the named colour nearest to the median of the image's frame is the one asked for. The
glyph is right if a small classifier, trained here on composed scenes and on no image of the model, names it among
all glyphs of the training. Its accuracy on fresh composed scenes, and on those after a pass through the autoencoder,
is measured beside it; so is how often no scene of another glyph, otherwise as asked for, is nearer in squared error.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image, ImageFilter
from pretrain import fetch_package, to_tensor
from scenes import BACKGROUNDS, GLYPHS, Scene, draw_scene, load_glyphs, render
from torch import Tensor, nn
from tqdm.auto import tqdm

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))
from coeff_diffusers.commands.sheet import sheet  # noqa: E402

WORDS = list(GLYPHS)


def main(args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(args.seed)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    package = args.emoji_package or fetch_package(args.work_dir)
    glyphs = load_glyphs(package, GLYPHS)
    classifier = trained_classifier(glyphs, args.classifier_steps, args.work_dir)
    pipe = load_pipeline(args.model)
    pipe.set_progress_bar_config(disable=True)

    rng = random.Random(args.seed)
    real = [draw_scene(words, rng) for words in WORDS for _ in range(4)]
    real_images = to_tensor([render(scene, glyphs[scene.words]) for scene in real])
    asked = [draw_scene(words, rng) for words in WORDS for _ in range(args.images_per_glyph)]
    images = generate(pipe, asked, args)
    named = name_glyphs(classifier, to_tensor(images))
    glyph_right = [scene.words == name for scene, name in zip(asked, named)]
    background_right = [scene.background == name_background(image) for scene, image in zip(asked, images)]

    missed = Counter(scene.words for scene, right in zip(asked, glyph_right) if not right)
    result = {
        "images": len(asked),
        "glyphs": len(WORDS),
        "inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        "background_right": share(background_right),
        "glyph_right": share(glyph_right),
        "nearest_scene_right": share([s.words == nearest_glyph(s, p, glyphs) for s, p in zip(asked, images)]),
        "classifier_on_composed_scenes": accuracy(classifier, real, real_images),
        "classifier_on_reconstructed_scenes": accuracy(classifier, real, reconstruct(pipe, real_images)),
        "never_recognised": sorted(w for w, count in missed.items() if count == args.images_per_glyph),
    }
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    if args.grid:
        draw_grid(asked, images, random.Random(args.seed)).save(args.grid)
    return result


def share(right: list[bool]) -> float:
    return round(sum(right) / len(right), 4)


# ------------------------------------------------------------------------------------------------------- generating


def load_pipeline(folder: Path) -> DiffusionPipeline:
    """With None passed for every part that it has not, as Stable Diffusion 3 without T5 asks for."""
    config = DiffusionPipeline.load_config(folder)
    left_out = [name for name, kind in config.items() if kind == [None, None]]
    return DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, **dict.fromkeys(left_out))


def generate(pipe: DiffusionPipeline, scenes: list[Scene], args: argparse.Namespace) -> list[Image.Image]:
    """An image per scene; image i has seed `args.seed + i` whatever the batch size."""
    own = {"guidance_rescale": args.guidance_rescale}
    if not isinstance(pipe, StableDiffusionPipeline):
        own = {"max_sequence_length": 1}  # zeros in place of T5, which it has not
    images = []
    for start in tqdm(range(0, len(scenes), 16), desc="images"):
        batch = scenes[start : start + 16]
        generators = [torch.Generator().manual_seed(args.seed + start + i) for i in range(len(batch))]
        images += pipe(
            [scene.caption for scene in batch],
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            generator=generators,
            **own,
        ).images
    return images


@torch.no_grad()
def reconstruct(pipe: DiffusionPipeline, images: Tensor) -> Tensor:
    """Through the autoencoder and back, (N, 3, 64, 64) in [-1, 1]."""
    parts = [pipe.vae.decode(pipe.vae.encode(part).latent_dist.mode()).sample for part in images.split(64)]
    return torch.cat(parts).clamp(-1, 1)


def name_background(image: Image.Image) -> str:
    """The named colour nearest to the median of the outermost two pixels all round."""
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).float()
    frame = [pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]]
    median = torch.cat([part.reshape(-1, 3) for part in frame]).median(dim=0).values
    return min(BACKGROUNDS, key=lambda name: float((median - torch.tensor(BACKGROUNDS[name])).norm()))


def nearest_glyph(scene: Scene, image: Image.Image, glyphs: dict[str, Image.Image]) -> str:
    """The glyph whose scene, otherwise the same, is nearest to the image in squared error."""
    scenes = to_tensor([render(replace(scene, words=words), glyph) for words, glyph in glyphs.items()])
    return list(glyphs)[int((scenes - to_tensor([image])).square().sum((1, 2, 3)).argmin())]


def draw_grid(scenes: list[Scene], images: list[Image.Image], rng: random.Random) -> Image.Image:
    """32 of the images, drawn by lot, with their prompts."""
    chosen = rng.sample(range(len(scenes)), min(32, len(scenes)))
    rows = [chosen[start : start + 8] for start in range(0, len(chosen), 8)]
    return sheet([("", [images[i] for i in row], [scenes[i].caption for i in row]) for row in rows])


# ------------------------------------------------------------------------------------------------------- classifier


def new_classifier(classes: int) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 96), (96, 128)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.Conv2d(after, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(128, classes))


def trained_classifier(glyphs: dict[str, Image.Image], steps: int, folder: Path) -> nn.Module:
    """Trained on composed scenes of any size, place and colour, some blurred; kept in `folder` for these glyphs."""
    words = list(glyphs)
    cache = folder / f"classifier-{len(words)}-{steps}-{zlib.crc32(' '.join(words).encode()):08x}.pt"
    classifier = new_classifier(len(words))
    if cache.exists():
        classifier.load_state_dict(torch.load(cache))
        return classifier.eval()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    rng = random.Random(1)
    progress = tqdm(range(steps), desc="classifier")
    for _ in progress:
        labels = [rng.randrange(len(words)) for _ in range(64)]
        images = to_tensor([augmented(glyphs[words[label]], rng) for label in labels])
        loss = F.cross_entropy(classifier(images), torch.tensor(labels), label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    torch.save(classifier.state_dict(), cache)
    return classifier.eval()


def augmented(glyph: Image.Image, rng: random.Random) -> Image.Image:
    colour = rng.choice(list(BACKGROUNDS.values()))
    pixels = rng.randint(25, 60)
    image = Image.new("RGB", (64, 64), tuple(min(255, max(0, c + rng.randint(-20, 20))) for c in colour))
    small = glyph.resize((pixels, pixels), Image.Resampling.LANCZOS)
    image.paste(small, (rng.randint(-2, 66 - pixels), rng.randint(-2, 66 - pixels)), small)
    return image.filter(ImageFilter.GaussianBlur(rng.choice([0, 0.5, 1.0, 1.5])))


@torch.no_grad()
def name_glyphs(classifier: nn.Module, images: Tensor) -> list[str]:
    return [WORDS[i] for part in images.split(64) for i in classifier(part).argmax(1)]


def accuracy(classifier: nn.Module, scenes: list[Scene], images: Tensor) -> float:
    return share([scene.words == name for scene, name in zip(scenes, name_glyphs(classifier, images))])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--emoji_package", type=Path, help="folder of the unpacked npm package; fetched if not given")
    parser.add_argument("--work_dir", type=Path, default=HERE / "work")
    parser.add_argument("--images_per_glyph", type=int, default=2)
    parser.add_argument("--classifier_steps", type=int, default=3000)
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--guidance_scale", type=float, default=2.5)
    parser.add_argument("--guidance_rescale", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result to this file too")
    parser.add_argument("--grid", type=Path, help="write a sheet of images with their prompts")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
