"""One run trains many subjects, each as if alone; then one batch shows them all. Writes `NAME.png` of each.

    python examples/train_many_subjects.py --subjects subjects.yaml --output_dir outputs/pets

A subject of the file: {name: rex, images: images/rex, prompt: a sks dog, caption_column: text}.
"""

import argparse

import yaml
from diffusers import DiffusionPipeline

from coeff_diffusers import AdapterStore, coeff_per_sample
from coeff_diffusers.training import DreamBoothSettings, train_dreambooth

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--pretrained_model_name_or_path", default="stable-diffusion-v1-5/stable-diffusion-v1-5")
parser.add_argument("--subjects", default="subjects.yaml")
parser.add_argument("--output_dir", default="outputs/pets")
parser.add_argument("--max_train_steps", type=int, default=500)
parser.add_argument("--num_inference_steps", type=int, default=50)
args = parser.parse_args()

settings = DreamBoothSettings(
    args.pretrained_model_name_or_path, subjects=args.subjects, output_dir=args.output_dir,
    max_train_steps=args.max_train_steps, gradient_checkpointing=True, report_to="none",
)  # fmt: skip
train_dreambooth(settings)

with open(args.subjects, encoding="utf-8") as file:
    prompts = {subject["name"]: subject["prompt"] for subject in yaml.safe_load(file)}
pipe = DiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path)
AdapterStore(args.output_dir).attach(pipe)
with coeff_per_sample(pipe, list(prompts)):
    images = pipe(list(prompts.values()), num_inference_steps=args.num_inference_steps).images
for name, image in zip(prompts, images):
    image.save(f"{name}.png")
