"""What coefficients do to the maps of a word, in numbers and as a sheet, on the model that ships with the project.

    python examples/attention_maps.py
    python examples/demo.py --subject "panda face"
    python examples/attention_maps.py --coeff_weights outputs/demo --subject "panda face"

Four images of the subject, on backgrounds that its training did not show. Of each layer with cross-attention the mean
over images and heads of: the word's share of attention, on the subject and beside it, before and after mixing; how
large the change is; and how many entries of the mixed maps no softmax could have. Writes `outputs/maps.png`, of those
three layers with the most places that change most.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from coeff_diffusers import AttentionMaps, attention_maps, load_coeff_weights
from coeff_diffusers.commands.maps import maps_sheet

HERE = Path(__file__).parent
sys.path.append(str(HERE))
from demo import MODEL, NEW_BACKGROUNDS, SAMPLING, prompt  # noqa: E402


def main(args: argparse.Namespace) -> list[tuple[str, list[float]]]:
    pipe = StableDiffusionPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    load_coeff_weights(pipe, args.coeff_weights)
    sampling = SAMPLING | {"num_inference_steps": args.num_inference_steps}
    found = [
        attention_maps(
            pipe, prompt(args.subject, colour), args.subject, generator=torch.Generator().manual_seed(0), **sampling
        )
        for colour in NEW_BACKGROUNDS[: args.images]
    ]
    rows = [(path, numbers(found, path)) for path in found[0].before]
    print(f"{'layer':58}{'on the subject':>20}{'beside it':>20}  change  outside 0 to 1")
    for path, (on, on_after, off, off_after, change, outside) in rows:
        layer = path.replace("attentions.", "").replace("transformer_blocks.", "")
        print(f"{layer:58}{on:10.2f}{on_after:10.2f}{off:10.2f}{off_after:10.2f}{change:8.1f}{outside:16.0%}")
    args.output_file.parent.mkdir(parents=True, exist_ok=True)
    first, title = found[0], f"{args.subject!r} in {prompt(args.subject, NEW_BACKGROUNDS[0])!r}"
    places = max(maps[0].numel() for maps in first.before.values())
    shown = [path for path in first.most_changed() if first.before[path][0].numel() == places]
    maps_sheet(first, title, shown[:3]).save(args.output_file)
    print(f"wrote {args.output_file}")
    return rows


def numbers(found: list[AttentionMaps], path: str) -> list[float]:
    """The mean magnitude of the heads' maps on the subject and beside it, before and after; change; share outside."""
    means = torch.zeros(6)
    for one in found:
        before, after = one.before[path], one.after[path]
        subject = subject_mask(one.image, before.shape[1:])
        for place, mask in enumerate((subject, 1 - subject)):
            for i, maps in enumerate((before, after)):
                means[2 * place + i] += ((maps.abs() * mask).sum((1, 2)) / mask.sum()).mean()
        means[4] += (after - before).norm() / before.norm()
        means[5] += ((after < 0) | (after > 1)).float().mean()
    return (means / len(found)).tolist()


def subject_mask(image: Image.Image, size: tuple[int, ...]) -> Tensor:
    """(h, w), from 0 to 1: how much of a place differs from the colour of the image's border."""
    pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).float()
    pixels = pixels.view(image.height, image.width, 3)
    border = torch.cat([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]).median(0).values
    differs = ((pixels - border).abs().amax(-1) > 60).float()
    return torch.nn.functional.adaptive_avg_pool2d(differs[None, None], size)[0, 0].clamp(1e-6, 1 - 1e-6)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coeff_weights", type=Path, default=HERE / "emoji" / "coefficients" / "fox.safetensors")
    parser.add_argument("--subject", default="fox face")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--output_file", type=Path, default=Path("outputs/maps.png"))
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
