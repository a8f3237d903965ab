"""A run by its flags, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coeff_diffusers.training import parse_settings, train_dreambooth


def main(argv: Sequence[str]) -> Any:
    return train_dreambooth(parse_settings(argv))
