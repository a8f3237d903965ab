"""Coeff-Tuning for diffusers: every attention head may use a combination of all heads' maps. Weights stay frozen."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from .hub import push_coeff_to_hub
    from .maps import AttentionMaps, attention_maps, overlay_map
    from .methods import add_coeff_methods
    from .per_sample import coeff_per_sample
    from .processor import CoeffAttnProcessor
    from .store import AdapterStore

__version__ = "0.1.0"  # the only place: pyproject.toml reads it here

# Modules are loaded by what is asked for: the command line's --help needs no torch, which takes seconds.
_MODULES = {
    "AdapterStore": "store",
    "AttentionMaps": "maps",
    "CoeffAttnProcessor": "processor",
    "CoeffConfig": "config",
    "add_coeff_adapter": "adapters",
    "add_coeff_methods": "methods",
    "attention_maps": "maps",
    "check_coeff_adapters": "check",
    "coeff_adapters": "adapters",
    "coeff_disabled": "adapters",
    "coeff_parameters": "adapters",
    "coeff_per_sample": "per_sample",
    "coeff_state_dict": "checkpoint",
    "delete_coeff_adapters": "adapters",
    "disable_coeff_adapters": "adapters",
    "enable_coeff_adapters": "adapters",
    "get_active_coeff_adapters": "adapters",
    "get_mixing_backend": "backends",
    "list_coeff_adapters": "adapters",
    "load_coeff_weights": "checkpoint",
    "merge_coeff_files": "arithmetic",
    "mixed_attention": "functional",
    "overlay_map": "maps",
    "prune_coeff_file": "arithmetic",
    "push_coeff_to_hub": "hub",
    "read_coeff_metadata": "checkpoint",
    "save_coeff_weights": "checkpoint",
    "set_coeff_adapters": "adapters",
    "set_mixing_backend": "backends",
    "unload_coeff_weights": "adapters",
}

__all__ = [
    "AdapterStore",
    "AttentionMaps",
    "CoeffAttnProcessor",
    "CoeffConfig",
    "add_coeff_adapter",
    "add_coeff_methods",
    "attention_maps",
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
    "overlay_map",
    "prune_coeff_file",
    "push_coeff_to_hub",
    "read_coeff_metadata",
    "save_coeff_weights",
    "set_coeff_adapters",
    "set_mixing_backend",
    "unload_coeff_weights",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
