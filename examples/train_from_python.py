"""Training from Python: images with captions in, a callback a step, coefficients out.

    python examples/train_from_python.py --images my-dog/*.jpg --output_dir outputs/my-dog

The caption of each image is asked for; it should name what the prompt is to go on deciding, such as the background.
"""

import argparse

from PIL import Image

from coeff_diffusers.training import DreamBoothSettings, TrainingStep, train_dreambooth

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--pretrained_model_name_or_path", default="stable-diffusion-v1-5/stable-diffusion-v1-5")
parser.add_argument("--images", nargs="+", required=True)
parser.add_argument("--captions", nargs="+", help="one for each image, in place of being asked")
parser.add_argument("--output_dir", default="outputs/my-dog")
parser.add_argument("--max_train_steps", type=int, default=500)
args = parser.parse_args()


def show(step: TrainingStep) -> None:
    if step.number % 50 == 0 or step.number == step.of:
        print(f"step {step.number} of {step.of}, loss {step.loss:.4f}")


captions = args.captions or [input(f"{image}, as in 'a sks dog on grass': ") for image in args.images]
images = [(Image.open(image), caption) for image, caption in zip(args.images, captions, strict=True)]
settings = DreamBoothSettings(
    args.pretrained_model_name_or_path, instance_prompt="a sks dog", output_dir=args.output_dir,
    max_train_steps=args.max_train_steps, gradient_checkpointing=True, report_to="none",
)  # fmt: skip
result = train_dreambooth(settings, images, on_step=show)
print(f"wrote {result.coeff_file}, with {result.trained['coefficients']:,} parameters")
