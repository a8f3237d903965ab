"""A script, or a command of `coeff-diffusers`, on two processes of a CPU, as `accelerate launch` starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from torch.distributed.elastic.utils.distributed import get_free_port

CONFIGS = Path(__file__).parents[1] / "training" / "configs"


def on_two_processes(script: Path | str, arguments: list[str], config: str) -> subprocess.CompletedProcess[str]:
    started = [str(script)] if isinstance(script, Path) else ["-m", "coeff_diffusers", script]
    launch = [
        sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--mixed_precision", "no",
        "--config_file", str(CONFIGS / config), "--main_process_port", str(get_free_port()), *started,
    ]  # fmt: skip
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}  # the flag --cpu starts one process
    return subprocess.run([*launch, *arguments], env=environment, capture_output=True, text=True, timeout=300)
