"""Three lines: a pipeline, a subject's coefficients, an image. Writes `image.png`.

    python examples/three_lines.py --coeff_weights outputs/my-dog --prompt "a sks dog on a beach"
    python examples/three_lines.py --pretrained_model_name_or_path examples/emoji/model \\
        --coeff_weights examples/emoji/coefficients/fox.safetensors --prompt "a sks fox face on a blue background"
"""

import argparse

from diffusers import DiffusionPipeline

from coeff_diffusers import load_coeff_weights

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--pretrained_model_name_or_path", default="stable-diffusion-v1-5/stable-diffusion-v1-5")
parser.add_argument("--coeff_weights", default="outputs/my-dog", help="a file, a folder or a repository of the Hub")
parser.add_argument("--prompt", default="a sks dog on a beach")
parser.add_argument("--num_inference_steps", type=int, default=50)
args = parser.parse_args()

pipe = DiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path)  # .to("cuda") on a GPU
load_coeff_weights(pipe, args.coeff_weights)
pipe(args.prompt, num_inference_steps=args.num_inference_steps).images[0].save("image.png")
