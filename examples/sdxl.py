"""Two subjects in one batch by Stable Diffusion XL, in bfloat16. Writes `0.png` and `1.png`.

    coeff-diffusers train --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \\
        --mixed_precision bf16 --gradient_checkpointing ... --output_dir outputs/my-dog
    python examples/sdxl.py --coeff_weights outputs/my-dog outputs/my-cat
"""

import argparse

import torch
from diffusers import StableDiffusionXLPipeline

from coeff_diffusers import load_coeff_weights

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--pretrained_model_name_or_path", default="stabilityai/stable-diffusion-xl-base-1.0")
parser.add_argument("--coeff_weights", nargs=2, default=["outputs/my-dog", "outputs/my-cat"])
parser.add_argument("--prompts", nargs=2, default=["a sks dog on a beach", "a sks cat on a beach"])
parser.add_argument("--num_inference_steps", type=int, default=50)
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
pipe = StableDiffusionXLPipeline.from_pretrained(args.pretrained_model_name_or_path, dtype=torch.bfloat16).to(device)
for name, file in zip(("dog", "cat"), args.coeff_weights):
    load_coeff_weights(pipe, file, adapter_name=name)  # stays in float32
choice = {"coeff": ["dog", "cat"]}
images = pipe(args.prompts, cross_attention_kwargs=choice, num_inference_steps=args.num_inference_steps).images
for number, image in enumerate(images):
    image.save(f"{number}.png")
