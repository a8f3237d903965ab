"""How like its subject and its prompts is what a file makes? Images of some prompts, and their scores by CLIP.

    python examples/evaluation.py --coeff_weights outputs/my-dog --reference my-dog --output_dir outputs/evaluation

Writes the images and `scores.json`, `.csv`, `.md` and `.html`. CLIP-T is the likeness to the prompt, CLIP-I that to
the reference images. Scores tell settings of one subject apart; they compare nothing across encoders.
"""

import argparse
import json
from pathlib import Path

from coeff_diffusers.cli import main

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--pretrained_model_name_or_path", default="stable-diffusion-v1-5/stable-diffusion-v1-5")
parser.add_argument("--coeff_weights", default="outputs/my-dog")
parser.add_argument("--reference", default="my-dog", help="a folder with images of the subject")
parser.add_argument("--clip_model", default="openai/clip-vit-base-patch32")
parser.add_argument("--subject", default="dog")
parser.add_argument("--places", nargs="+", default=["in the snow", "on a beach", "on a city street"])
parser.add_argument("--num_inference_steps", default="50")
parser.add_argument("--output_dir", type=Path, default=Path("outputs/evaluation"))
args = parser.parse_args()

args.output_dir.mkdir(parents=True, exist_ok=True)
prompts = args.output_dir / "prompts.jsonl"
with open(prompts, "w", encoding="utf-8") as file:
    for place in args.places:
        words = {"prompt": f"a sks {args.subject} {place}", "clip_prompt": f"a {args.subject} {place}"}
        file.write(json.dumps(words | {"coeff": "subject"}) + "\n")
images = str(args.output_dir / "images")
main(["generate", "--pretrained_model_name_or_path", args.pretrained_model_name_or_path, "--output_dir", images,
      "--coeff_weights", f"subject={args.coeff_weights}", "--prompts_file", str(prompts),
      "--num_images_per_prompt", "4", "--num_inference_steps", args.num_inference_steps])  # fmt: skip
main(["score", "--images", images, "--reference", f"subject={args.reference}", "--clip_model", args.clip_model])
