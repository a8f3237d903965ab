"""DreamBooth with attention coefficients: a subject from a few images, the base model frozen.

    accelerate launch training/train_dreambooth.py --pretrained_model_name_or_path MODEL \\
        --instance_data_dir IMAGES --instance_prompt "a sks dog" --output_dir RESULT

This is what `coeff-diffusers train` and `coeff_diffusers.training.train_dreambooth` do, step by step, to be copied and
changed. What the steps do stands in coeff_diffusers/training/run/dreambooth.py.
"""

from __future__ import annotations

from coeff_diffusers.console import escaped_output, hush
from coeff_diffusers.training import DreamBoothRun, parse_settings
from coeff_diffusers.training.errors import exit_on_errors


@exit_on_errors()
@escaped_output()
def main() -> None:
    settings = parse_settings()  # the flags; --help shows them
    hush()  # what libraries log of themselves while they are loaded
    run = DreamBoothRun(settings)  # checks them and reads the images, before anything is loaded
    run.load_model()  # the pipeline, frozen: text encoders encode the prompts and go, then the denoiser comes
    run.add_adapters()  # coefficients, at zero, and a LoRA if asked for
    run.encode_prompts()  # with --train_text_encoder, by the text encoders that do not train
    for step in run.steps():
        # One optimizer step is done: step.number, step.loss, step.learning_rates. Your own lines go here.
        # run.family.pipeline is the pipeline with what is trained on it, run.state its parameters and optimizer.
        if step.number == 1:
            run.accelerator.print(f"The first loss is {step.loss:.4f}.")
    run.finish()  # writes weights, images of --validation_prompt, model card and config.yaml


if __name__ == "__main__":
    main()
