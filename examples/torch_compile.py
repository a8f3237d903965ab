"""Compiled blocks of the UNet: other subjects and other weights compile nothing again. Writes `dog.png` and `cat.png`.

    python examples/torch_compile.py --coeff_weights outputs/my-dog outputs/my-cat

The whole UNet can be compiled, too: `pipe.unet = torch.compile(pipe.unet)` takes longer, and may gain more.
"""

import argparse

import torch
from diffusers import DiffusionPipeline

from coeff_diffusers import load_coeff_weights, set_coeff_adapters

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--pretrained_model_name_or_path", default="stable-diffusion-v1-5/stable-diffusion-v1-5")
parser.add_argument("--coeff_weights", nargs=2, default=["outputs/my-dog", "outputs/my-cat"])
parser.add_argument("--prompts", nargs=2, default=["a sks dog on a beach", "a sks cat on a beach"])
parser.add_argument("--backend", default="inductor", help="of torch.compile; eager tries it without a compiler")
parser.add_argument("--num_inference_steps", type=int, default=50)
args = parser.parse_args()
steps = {"num_inference_steps": args.num_inference_steps}

pipe = DiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path)
for name, file in zip(("dog", "cat"), args.coeff_weights):
    load_coeff_weights(pipe, file, adapter_name=name)
pipe.unet.compile_repeated_blocks(fullgraph=True, backend=args.backend)
set_coeff_adapters(pipe, "dog")
pipe(args.prompts[0], **steps).images[0].save("dog.png")  # compiles
with torch.compiler.set_stance("fail_on_recompile"):
    set_coeff_adapters(pipe, "cat", 0.9)
    pipe(args.prompts[1], **steps).images[0].save("cat.png")
