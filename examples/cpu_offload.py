"""Little memory on the GPU: parts of the pipeline, or its layers, are there while they compute. Writes `image.png`.

    python examples/cpu_offload.py --offload group --prompt "a sks dog on a beach"

Coefficients are no part of the modules that are moved; they go to the device where their layer is called.
"""

import argparse

import torch
from diffusers import DiffusionPipeline

from coeff_diffusers import load_coeff_weights

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--pretrained_model_name_or_path", default="stable-diffusion-v1-5/stable-diffusion-v1-5")
parser.add_argument("--coeff_weights", default="outputs/my-dog")
parser.add_argument("--prompt", default="a sks dog on a beach")
parser.add_argument("--offload", choices=("model", "group"), default="model", help="by parts, or by layers")
parser.add_argument("--device", default="cuda", help="where it computes")
parser.add_argument("--num_inference_steps", type=int, default=50)
args = parser.parse_args()

pipe = DiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path)
load_coeff_weights(pipe, args.coeff_weights)
if args.offload == "model":
    pipe.enable_model_cpu_offload(device=args.device)
else:
    pipe.enable_group_offload(onload_device=torch.device(args.device), offload_type="leaf_level")
pipe(args.prompt, num_inference_steps=args.num_inference_steps).images[0].save("image.png")
