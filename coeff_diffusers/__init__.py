"""Coeff-Tuning for diffusers: every attention head may use a combination of all heads' maps. Weights stay frozen."""

from .adapters import (
    add_coeff_adapter,
    coeff_disabled,
    coeff_parameters,
    delete_coeff_adapters,
    get_active_coeff_adapters,
    list_coeff_adapters,
    set_coeff_adapters,
    unload_coeff_weights,
)
from .check import check_coeff_adapters
from .checkpoint import load_coeff_weights, save_coeff_weights
from .config import CoeffConfig
from .functional import mixed_attention
from .processor import CoeffAttnProcessor

__version__ = "0.1.0"

__all__ = [
    "CoeffAttnProcessor",
    "CoeffConfig",
    "add_coeff_adapter",
    "check_coeff_adapters",
    "coeff_disabled",
    "coeff_parameters",
    "delete_coeff_adapters",
    "get_active_coeff_adapters",
    "list_coeff_adapters",
    "load_coeff_weights",
    "mixed_attention",
    "save_coeff_weights",
    "set_coeff_adapters",
    "unload_coeff_weights",
]
