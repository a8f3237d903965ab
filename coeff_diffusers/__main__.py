"""`python -m coeff_diffusers`, which `accelerate launch -m` starts as well: the command line `coeff-diffusers`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
