"""accelerate's start: the precision, and which ways of running several processes can train."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration

from ..errors import InputError
from ..settings.dreambooth import CheckpointSettings, OutputSettings, StepSettings

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PATIENCE = timedelta(hours=2)  # of the other processes, while the main one generates validation images


def start_accelerator(settings: StepSettings, output: OutputSettings) -> Accelerator:
    """Raises InputError if the device has not the precision asked for."""
    torch.backends.cuda.matmul.allow_tf32 = settings.allow_tf32
    # of an earlier run in this process, which had another precision, ended its group of processes, or broke off
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    GradientState._reset_state()
    output_dir = Path(output.output_dir)
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=settings.gradient_accumulation_steps,
            mixed_precision=settings.mixed_precision,
            log_with=None if output.report_to == "none" else output.report_to,
            project_config=ProjectConfiguration(str(output_dir), logging_dir=str(output_dir / output.logging_dir)),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
    except ValueError as error:  # a precision that the device does not have
        raise InputError(f"--mixed_precision: {error}") from error
    precision, device = accelerator.mixed_precision, accelerator.device.type
    if precision not in DTYPES:
        raise InputError(f"--mixed_precision must be of {', '.join(DTYPES)}, got {precision} from accelerate's config")
    if precision == "fp16" and device == "cpu":  # accelerate would run without autocast
        raise InputError("--mixed_precision fp16 needs a GPU, and this runs on cpu; use bf16 or no")
    return accelerator


def check_processes(
    settings: StepSettings, checkpoints: CheckpointSettings, several_subjects: bool, accelerator: Accelerator
) -> None:
    """Raises InputError if accelerate was started in a way that cannot train, or --fsdp cannot be had."""
    kind = accelerator.distributed_type
    known = (DistributedType.NO, DistributedType.DEEPSPEED)
    if kind not in known and not kind.value.startswith("MULTI_"):
        raise InputError(
            f"accelerate was started with {kind.value}, which would shard the trainable parameters as well; start it "
            "with training/configs/multi_gpu.yaml, and give --fsdp to shard the frozen model"
        )
    if kind == DistributedType.DEEPSPEED:
        stage = accelerator.state.deepspeed_plugin.zero_stage
        if stage > 2:
            raise InputError(f"ZeRO stage {stage} would shard the frozen model; use --fsdp without DeepSpeed")
        if accelerator.mixed_precision != "no":
            raise InputError(
                f"DeepSpeed would cast trainable parameters to {accelerator.mixed_precision} as well; give "
                "--mixed_precision no, or start with training/configs/multi_gpu.yaml"
            )
        if checkpoints.resume_from_checkpoint or settings.use_ema or several_subjects:
            raise InputError("--resume_from_checkpoint, --use_ema and --subjects cannot be had under DeepSpeed")
    if settings.fsdp and (accelerator.num_processes == 1 or kind == DistributedType.DEEPSPEED):
        raise InputError("--fsdp shards the frozen model over several processes, without DeepSpeed")
