"""Two subjects in one batch by FLUX.1, part by part on the GPU if there is one. Writes `0.png` and `1.png`.

    coeff-diffusers train --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev --guidance_scale 1 \\
        --resolution 512 --mixed_precision bf16 --gradient_checkpointing ... --output_dir outputs/my-dog
    python examples/flux.py --coeff_weights outputs/my-dog outputs/my-cat
"""

import argparse

import torch
from diffusers import FluxPipeline

from coeff_diffusers import load_coeff_weights

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--pretrained_model_name_or_path", default="black-forest-labs/FLUX.1-dev")
parser.add_argument("--coeff_weights", nargs=2, default=["outputs/my-dog", "outputs/my-cat"])
parser.add_argument("--prompts", nargs=2, default=["a sks dog on a beach", "a sks cat on a beach"])
parser.add_argument("--side", type=int, default=512, help="of the images, in pixels")
parser.add_argument("--num_inference_steps", type=int, default=28)
args = parser.parse_args()
settings = {"height": args.side, "width": args.side, "num_inference_steps": args.num_inference_steps}

pipe = FluxPipeline.from_pretrained(args.pretrained_model_name_or_path, dtype=torch.bfloat16)
if torch.cuda.is_available():
    pipe.enable_model_cpu_offload()
for name, file in zip(("dog", "cat"), args.coeff_weights):
    load_coeff_weights(pipe, file, adapter_name=name)
images = pipe(args.prompts, joint_attention_kwargs={"coeff": ["dog", "cat"]}, **settings).images
for number, image in enumerate(images):
    image.save(f"{number}.png")
