"""A frozen model sharded over several processes.

What trains is small, so every process has all of it, as with plain data parallelism. What is large is frozen: with
`--fsdp` each process keeps its shard of the denoiser's blocks, and gathers a block while it is computed (torch's
`fully_shard`). A forward pass of the denoiser is then one of all processes together, in validation too.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ...quantization import parameter_count


def shard_frozen_weights(denoiser: nn.Module, device: torch.device) -> None:
    """Leaves each process its share of the denoiser's blocks, on `device`; the few weights outside of blocks whole.

    Adapters that are put on later stay whole, too.
    """
    from torch.distributed import get_world_size
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (get_world_size(),))
    for block in blocks(denoiser):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)  # by default not where there is none around it


def blocks(denoiser: nn.Module) -> list[nn.Module]:
    """What a denoiser is a list of, and a UNet's middle; the outermost of them."""
    paths = ["mid_block"] if isinstance(getattr(denoiser, "mid_block", None), nn.Module) else []
    for path, module in denoiser.named_modules():
        if isinstance(module, nn.ModuleList) and not any(path.startswith(f"{other}.") for other in paths):
            paths += [f"{path}.{index}" for index in range(len(module))]
    found = [denoiser.get_submodule(path) for path in paths]
    return [block for block in found if next(block.parameters(), None) is not None]


def held(parameter: nn.Parameter) -> int:
    """How many of a parameter's numbers this process holds."""
    return parameter.to_local().numel() if isinstance(parameter, DTensor) else parameter_count(parameter)
