"""Coeff-Tuning for diffusers: every attention head may use a combination of all heads' maps. Weights stay frozen."""

from .adapters import (
    add_coeff_adapter,
    coeff_adapters,
    coeff_disabled,
    coeff_parameters,
    delete_coeff_adapters,
    disable_coeff_adapters,
    enable_coeff_adapters,
    get_active_coeff_adapters,
    list_coeff_adapters,
    set_coeff_adapters,
    unload_coeff_weights,
)
from .arithmetic import merge_coeff_files, prune_coeff_file
from .backends import get_mixing_backend, set_mixing_backend
from .check import check_coeff_adapters
from .checkpoint import coeff_state_dict, load_coeff_weights, read_coeff_metadata, save_coeff_weights
from .config import CoeffConfig
from .functional import mixed_attention
from .per_sample import coeff_per_sample
from .processor import CoeffAttnProcessor

__version__ = "0.1.0"  # the only place: pyproject.toml reads it here

__all__ = [
    "CoeffAttnProcessor",
    "CoeffConfig",
    "add_coeff_adapter",
    "check_coeff_adapters",
    "coeff_adapters",
    "coeff_disabled",
    "coeff_parameters",
    "coeff_per_sample",
    "coeff_state_dict",
    "delete_coeff_adapters",
    "disable_coeff_adapters",
    "enable_coeff_adapters",
    "get_active_coeff_adapters",
    "get_mixing_backend",
    "list_coeff_adapters",
    "load_coeff_weights",
    "merge_coeff_files",
    "mixed_attention",
    "prune_coeff_file",
    "read_coeff_metadata",
    "save_coeff_weights",
    "set_coeff_adapters",
    "set_mixing_backend",
    "unload_coeff_weights",
]
