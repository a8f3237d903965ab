"""A subject by coefficients, and the style of an image by IP-Adapter. Writes `image.png`.

    python examples/with_ip_adapter.py --image painting.png --prompt "a sks dog on a beach"

Load the IP-Adapter first: it replaces attention processors, and the coefficients go on those that are there.
"""

import argparse

from diffusers import DiffusionPipeline
from diffusers.utils import load_image

from coeff_diffusers import load_coeff_weights

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--pretrained_model_name_or_path", default="stable-diffusion-v1-5/stable-diffusion-v1-5")
parser.add_argument("--ip_adapter", default="h94/IP-Adapter")
parser.add_argument("--image", default="painting.png", help="a file or an address")
parser.add_argument("--coeff_weights", default="outputs/my-dog")
parser.add_argument("--prompt", default="a sks dog on a beach")
parser.add_argument("--num_inference_steps", type=int, default=50)
args = parser.parse_args()

pipe = DiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path)
pipe.load_ip_adapter(args.ip_adapter, subfolder="models", weight_name="ip-adapter_sd15.safetensors")
load_coeff_weights(pipe, args.coeff_weights)
pipe.set_ip_adapter_scale(0.6)
style = load_image(args.image)
images = pipe(args.prompt, ip_adapter_image=style, num_inference_steps=args.num_inference_steps).images
images[0].save("image.png")
