"""A subject in the pose of another image, by ControlNet: the coefficients are the UNet's. Writes `image.png`.

    python examples/with_controlnet.py --control_image edges.png --prompt "a sks dog on a beach"

A ControlNet can have coefficients, too: docs/compatibility.md.
"""

import argparse

from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from diffusers.utils import load_image

from coeff_diffusers import load_coeff_weights

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--pretrained_model_name_or_path", default="stable-diffusion-v1-5/stable-diffusion-v1-5")
parser.add_argument("--controlnet_model_name_or_path", default="lllyasviel/control_v11p_sd15_canny")
parser.add_argument("--control_image", default="edges.png", help="a file or an address; here white edges on black")
parser.add_argument("--coeff_weights", default="outputs/my-dog")
parser.add_argument("--prompt", default="a sks dog on a beach")
parser.add_argument("--num_inference_steps", type=int, default=50)
args = parser.parse_args()

controlnet = ControlNetModel.from_pretrained(args.controlnet_model_name_or_path)
pipe = StableDiffusionControlNetPipeline.from_pretrained(args.pretrained_model_name_or_path, controlnet=controlnet)
load_coeff_weights(pipe, args.coeff_weights)
edges = load_image(args.control_image)
pipe(args.prompt, image=edges, num_inference_steps=args.num_inference_steps).images[0].save("image.png")
