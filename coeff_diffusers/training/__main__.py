"""`python -m coeff_diffusers.training`, which `accelerate launch -m` starts as well, and `coeff-diffusers train`."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import exit_on_errors
from .settings import parse_settings


@exit_on_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Trains as the flags `argv` say; `None` are this process's own. Ends the process with a message if it cannot."""
    settings = parse_settings(argv)
    from .run.dreambooth import train_dreambooth  # late, for it takes seconds, and --help needs none of it

    train_dreambooth(settings)


if __name__ == "__main__":
    main()
