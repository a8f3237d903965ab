"""A base model's own values of its pipeline's call, where those of the pipeline's class do not suit it."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

FILE = "generation_config.json"  # as transformers calls it; diffusers has none


def sampling_defaults(pipeline: Any) -> dict[str, Any]:
    """Of `generation_config.json` in the pipeline's own folder, such as `guidance_scale`; empty where there is none.

    Raises:
        ValueError: if the file cannot be read, or holds what the pipeline's call has not.
    """
    path = Path(str(pipeline.config.get("_name_or_path", ""))) / FILE
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        known = inspect.signature(type(pipeline).__call__).parameters
        unknown = [name for name in values if name not in known]
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict) or unknown:
        raise ValueError(f"{path} must hold arguments of {type(pipeline).__name__}'s call, got {values}")
    return values
