"""Several subjects in one batch: each image goes through its own coefficients. Writes `0.png`, `1.png` and `2.png`.

    python examples/several_subjects.py --adapters outputs/pets --subjects rex tom

`--adapters` is a folder with a file, or a folder, for each subject, as `coeff-diffusers train --subjects` leaves it.
"""

import argparse

from diffusers import DiffusionPipeline

from coeff_diffusers import AdapterStore, coeff_per_sample

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--pretrained_model_name_or_path", default="stable-diffusion-v1-5/stable-diffusion-v1-5")
parser.add_argument("--adapters", default="outputs/pets")
parser.add_argument("--subjects", nargs=2, default=["rex", "tom"])
parser.add_argument("--prompts", nargs=3, default=["a sks dog in the snow", "a sks cat in the snow", "the snow"])
parser.add_argument("--num_inference_steps", type=int, default=50)
args = parser.parse_args()

pipe = DiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path)
AdapterStore(args.adapters).attach(pipe)  # loads a subject when a call asks for it
with coeff_per_sample(pipe, [*args.subjects, None]):  # None is the base model
    images = pipe(args.prompts, num_inference_steps=args.num_inference_steps).images
for number, image in enumerate(images):
    image.save(f"{number}.png")
