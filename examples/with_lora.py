"""Coefficients beside a LoRA, each with a weight of its own. Writes `image.png`.

    coeff-diffusers train ... --lora_rank 4 --output_dir outputs/my-dog    # writes both, in two files
    python examples/with_lora.py --coeff_weights outputs/my-dog --lora_weights outputs/my-dog

The two need not be of one run: a LoRA for a style goes with the coefficients of a subject. Needs peft.
"""

import argparse

from diffusers import DiffusionPipeline

from coeff_diffusers import load_coeff_weights, set_coeff_adapters

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--pretrained_model_name_or_path", default="stable-diffusion-v1-5/stable-diffusion-v1-5")
parser.add_argument("--coeff_weights", default="outputs/my-dog")
parser.add_argument("--lora_weights", default="outputs/my-dog", help="a folder with pytorch_lora_weights.safetensors")
parser.add_argument("--prompt", default="a sks dog on a beach")
parser.add_argument("--num_inference_steps", type=int, default=50)
args = parser.parse_args()

pipe = DiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path)
pipe.load_lora_weights(args.lora_weights, weight_name="pytorch_lora_weights.safetensors", adapter_name="lora")
load_coeff_weights(pipe, args.coeff_weights, adapter_name="dog")
pipe.set_adapters("lora", 0.8)
set_coeff_adapters(pipe, "dog", 0.9)
pipe(args.prompt, num_inference_steps=args.num_inference_steps).images[0].save("image.png")
