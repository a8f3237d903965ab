"""The app as a Space, or in any container: the embedded model on a CPU, heard by everyone who reaches the port.

The model lies in `model`, its subjects in `coefficients`, beside this file as docs/app.md puts them; in a clone it is
that of examples/emoji.
"""

from pathlib import Path

from coeff_diffusers.app.run import run
from coeff_diffusers.app.settings import AppSettings

HERE = Path(__file__).parent
MODEL = next(folder for folder in (HERE, HERE.parent / "emoji") if (folder / "model").is_dir())

if __name__ == "__main__":
    run(
        AppSettings(
            pretrained_model_name_or_path=str(MODEL / "model"),
            adapters=str(MODEL / "coefficients"),
            host="0.0.0.0",
            port=7860,
            max_train_steps=500,
            max_train_runs=4,
        )
    )
