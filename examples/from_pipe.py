"""From text, from an image, and into a part of it: pipelines by `from_pipe` share the model, and the coefficients.

    python examples/from_pipe.py --prompt "a sks dog on a beach"

Writes `text.png`, `image.png` and `inpainted.png`.
"""

import argparse

from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionPipeline
from PIL import Image

from coeff_diffusers import load_coeff_weights

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--pretrained_model_name_or_path", default="stable-diffusion-v1-5/stable-diffusion-v1-5")
parser.add_argument("--coeff_weights", default="outputs/my-dog")
parser.add_argument("--prompt", default="a sks dog on a beach")
parser.add_argument("--num_inference_steps", type=int, default=50)
args = parser.parse_args()
steps = {"num_inference_steps": args.num_inference_steps}

pipe = StableDiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path)
load_coeff_weights(pipe, args.coeff_weights)
image = pipe(args.prompt, **steps).images[0]
image.save("text.png")

from_image = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
from_image(f"{args.prompt}, an oil painting", image=image, strength=0.7, **steps).images[0].save("image.png")

inpaint = StableDiffusionInpaintPipeline.from_pipe(pipe)
mask = Image.new("L", image.size)
mask.paste(255, (0, 0, image.width // 2, image.height))  # white, the left half, is painted anew
sides = {"height": image.height, "width": image.width}
inpaint(args.prompt, image=image, mask_image=mask, **sides, **steps).images[0].save("inpainted.png")
