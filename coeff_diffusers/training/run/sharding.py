"""Several processes: which ways of running them the script can do, and a frozen model that is shared out over them.

What trains is small, so every process has all of it, as with plain data parallelism. What is large is frozen: with
`--fsdp` each process keeps its share of the denoiser's blocks, and gathers a block while it is computed (torch's
`fully_shard`). A forward pass of the denoiser is then one of all processes together, in validation too.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor

from ..errors import InputError
from ..settings.dreambooth import DreamBoothSettings


def check_processes(settings: DreamBoothSettings, accelerator: Accelerator) -> None:
    """Raises InputError if accelerate was started in a way that the script does not know, or --fsdp cannot be had."""
    kind = accelerator.distributed_type
    known = (DistributedType.NO, DistributedType.DEEPSPEED)
    if kind not in known and not kind.value.startswith("MULTI_"):
        raise InputError(
            f"accelerate was started with {kind.value}, which would divide what trains as well; start it with "
            "training/configs/multi_gpu.yaml, and give --fsdp to share out the frozen model"
        )
    if kind == DistributedType.DEEPSPEED:
        stage = accelerator.state.deepspeed_plugin.zero_stage
        if stage > 2:
            raise InputError(f"ZeRO stage {stage} would divide the frozen model; use --fsdp without DeepSpeed")
        if accelerator.mixed_precision != "no":
            raise InputError(
                f"DeepSpeed would cast what trains to {accelerator.mixed_precision} as well; give --mixed_precision "
                "no, or start the script with training/configs/multi_gpu.yaml"
            )
        if settings.resume_from_checkpoint or settings.use_ema or settings.subjects:
            raise InputError("--resume_from_checkpoint, --use_ema and --subjects cannot be had under DeepSpeed")
    if settings.fsdp and (accelerator.num_processes == 1 or kind == DistributedType.DEEPSPEED):
        raise InputError("--fsdp shares the frozen model out over several processes, without DeepSpeed")


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


def sharded_names(model: nn.Module) -> list[str]:
    """Parameters that this process has a share of."""
    return [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]


def held(parameter: nn.Parameter) -> int:
    """How many of a parameter's numbers this process holds."""
    return parameter.to_local().numel() if isinstance(parameter, DTensor) else parameter.numel()
