"""The calls of this package as methods of diffusers' pipelines, as those of LoRA are.

They are put on the class that all pipelines inherit from. Methods of one pipeline object would be lost by `from_pipe`
and by pickling, and a copy's would act on the original; a subclass with a mixin would be written by `save_pretrained`
as a class that diffusers does not know.
"""

from __future__ import annotations

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
from .check import check_coeff_adapters
from .checkpoint import coeff_state_dict, load_coeff_weights, save_coeff_weights
from .hub import push_coeff_to_hub
from .per_sample import coeff_per_sample

METHODS = (
    add_coeff_adapter,
    check_coeff_adapters,
    coeff_adapters,
    coeff_disabled,
    coeff_parameters,
    coeff_per_sample,
    coeff_state_dict,
    delete_coeff_adapters,
    disable_coeff_adapters,
    enable_coeff_adapters,
    get_active_coeff_adapters,
    list_coeff_adapters,
    load_coeff_weights,
    push_coeff_to_hub,
    save_coeff_weights,
    set_coeff_adapters,
    unload_coeff_weights,
)


def add_coeff_methods() -> None:
    """Gives every pipeline of diffusers the functions on adapters as methods: `pipe.load_coeff_weights("dog")`.

    Each is the function of its name, with the pipeline as `model`. Once in a process is enough: pipelines that are
    there and those made later have them, by `from_pretrained`, `from_pipe`, `copy` or `pickle`.

    Raises:
        ValueError: if diffusers has other methods of these names; nothing is changed.
    """
    from diffusers import DiffusionPipeline, ModularPipeline

    classes = DiffusionPipeline, ModularPipeline
    taken = [
        f"{owner.__name__}.{method.__name__}"
        for owner in classes
        for method in METHODS
        if getattr(owner, method.__name__, method) is not method
    ]
    if taken:
        raise ValueError(f"diffusers has methods of these names already: {taken}; call the functions instead")
    for owner in classes:
        for method in METHODS:
            setattr(owner, method.__name__, method)
