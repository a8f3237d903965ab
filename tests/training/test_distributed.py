"""Several processes, started on the CPU as a user starts them, do what one does."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import DistributedType
from PIL import Image
from running import main
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_each_family import PROMPTS, generators, make_family, make_pipeline, pixels, sizes_of
from tiny_models import FAMILIES, SIDE, tiny_pipeline
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from two_processes import on_two_processes

from coeff_diffusers import coeff_parameters
from coeff_diffusers.training.adapters import add_adapters
from coeff_diffusers.training.errors import InputError
from coeff_diffusers.training.families.sharding import blocks, shard_frozen_weights
from coeff_diffusers.training.run.dreambooth import TrainingResult
from coeff_diffusers.training.run.processes import check_processes, start_accelerator
from coeff_diffusers.training.settings import DreamBoothSettings, parse_settings

Argv = Callable[..., list[str]]
Train = Callable[..., TrainingResult]
SCRIPT = Path(__file__).parents[2] / "training" / "train_dreambooth.py"
ROOT = SCRIPT.parents[1]
CONFIGS = sorted((ROOT / "training" / "configs").glob("*.yaml"))
SUBJECTS = {"subjects": "subjects.yaml", "instance_prompt": None, "instance_data_dir": None}
fully_shards_on_a_cpu = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="this torch shares models out over GPUs only"
)
WEIGHTS = ("pytorch_coeff_weights.safetensors", "pytorch_lora_weights.safetensors")


def run_two(argv: list[str], config: str) -> str:
    """What two processes print."""
    done = on_two_processes(SCRIPT, argv, config)
    assert done.returncode == 0, done.stderr
    return done.stdout


def weights(folder: Path) -> dict[str, Tensor]:
    return {key: value for name in WEIGHTS for key, value in load_file(folder / name).items()}


def flags(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    return {
        "max_train_steps": None,
        "num_train_epochs": 8,
        "gradient_accumulation_steps": 2,
        "scale_lr": True,
        "learning_rate": 0.05 / 8,
        "lr_scheduler": "linear",
        "lr_warmup_steps": 1,
        "lora_rank": 2,
        "train_text_encoder": True,
        "text_encoder_lr": 0.05 / 8,
        "adam_epsilon": 1e-3,
        "report_to": "tensorboard",
        "with_prior_preservation": True,
        "class_data_dir": tmp_path / "class",
        "class_prompt": "a fox",
        "num_class_images": 3,
        **changes,
    }


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(argv: Argv, train: Train, tmp_path: Path) -> None:
    two = tmp_path / "two"
    printed = run_two(argv(**flags(tmp_path), train_batch_size=2, output_dir=two), "multi_gpu.yaml")
    one = train(**flags(tmp_path), train_batch_size=4)
    # the gradients of the halves are averaged afterwards
    torch.testing.assert_close(weights(two), weights(tmp_path / "out"), rtol=1e-3, atol=1e-5)
    events = EventAccumulator(str(two / "logs" / "dreambooth")).Reload()
    rates = [event.value for event in events.Scalars("learning_rate/coefficients")]
    np.testing.assert_allclose(rates, [0.0, 0.05, 0.025], rtol=1e-6)  # float32 in the log
    losses = [event.value for event in events.Scalars("loss")]
    np.testing.assert_allclose(losses, one.losses, rtol=1e-4)  # sums in another order
    assert len(losses) == 3  # 3 images x 8 / (4 x 2)
    assert printed.count("Written:") == 1
    assert "Peak memory of the process, the largest of 2: " in printed


@pytest.mark.slow
@fully_shards_on_a_cpu
def test_a_frozen_model_that_is_shared_out_equals_one_that_is_whole(argv: Argv, train: Train, tmp_path: Path) -> None:
    images = {
        "validation_prompt": ["a sks fox"],
        "num_validation_images": 1,
        "validation_steps": 1,
        "validation_num_inference_steps": 2,
        "sample_batch_size": 1,
        "gradient_checkpointing": True,
    }
    two, settings = tmp_path / "two", flags(tmp_path, report_to="none", checkpointing_steps=1)
    printed = run_two(argv(**settings, **images, fsdp=True, train_batch_size=2, output_dir=two), "fsdp.yaml")
    frozen, here = re.search(r"all params: ([\d,]+) (?:.|\n)*process holds about ([\d,]+) of", printed).groups()
    # the UNet's blocks are halved, text encoder and VAE are not
    assert int(here.replace(",", "")) < 0.7 * int(frozen.replace(",", ""))
    made = {path.name: path.read_bytes() for path in (tmp_path / "class").iterdir()}
    assert len(made) == 3
    for path in (tmp_path / "class").iterdir():
        path.unlink()
    train(**settings, **images, train_batch_size=4)
    assert made == {path.name: path.read_bytes() for path in (tmp_path / "class").iterdir()}
    torch.testing.assert_close(weights(two), weights(tmp_path / "out"), rtol=1e-3, atol=1e-5)  # as above
    for step in (1, 2, 3):
        name = f"validation/step-{step:06d}/grid.png"
        found, expected = (np.asarray(Image.open(folder / name), dtype=int) for folder in (two, tmp_path / "out"))
        assert np.abs(found - expected).max() <= 1  # of 255


# Which ways there are


def accelerator(kind: DistributedType, processes: int = 2, stage: int = 0, precision: str = "no") -> Any:
    """In the place of one that was started so, which needs GPUs."""
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage))
    return SimpleNamespace(distributed_type=kind, num_processes=processes, state=state, mixed_precision=precision)


def check(settings: DreamBoothSettings, started: Any) -> None:
    check_processes(settings, settings, settings.subjects is not None, started)


@pytest.mark.parametrize(
    ("kind", "options", "changes", "message"),
    [
        ("FSDP", {}, {}, "accelerate was started with FSDP, which would shard the trainable parameters as well"),
        ("DEEPSPEED", {"stage": 3}, {}, "ZeRO stage 3 would shard the frozen model; use --fsdp"),
        ("DEEPSPEED", {"stage": 2, "precision": "bf16"}, {}, "would cast trainable parameters to bf16 as well"),
        ("DEEPSPEED", {"stage": 2}, {"use_ema": True}, "--use_ema and --subjects cannot be had under"),
        ("DEEPSPEED", {"stage": 2}, SUBJECTS, "--subjects cannot be had under DeepSpeed"),
        ("DEEPSPEED", {"stage": 2}, {"resume_from_checkpoint": "latest"}, "--resume_from_checkpoint, --use_ema"),
        ("DEEPSPEED", {"stage": 2}, {"fsdp": True}, "--fsdp shards the frozen model over several processes"),
        ("NO", {"processes": 1}, {"fsdp": True}, "--fsdp shards the frozen model over several processes"),
    ],
)
def test_a_way_that_the_script_does_not_know_is_refused(
    argv: Argv, kind: str, options: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        check(parse_settings(argv(**changes)), accelerator(DistributedType[kind], **options))


def test_processes_wait_for_images_longer_than_ten_minutes(argv: Argv, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in {**launched, "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}.items():
        monkeypatch.setenv(name, value)
    patience = []

    def init(**options: Any) -> None:
        patience.append(options["timeout"])
        raise RuntimeError("no group is wanted, only what it would be made with")

    monkeypatch.setattr(torch.distributed, "init_process_group", init)
    with pytest.raises(RuntimeError, match="no group is wanted"):
        start_accelerator(parse_settings(argv()), parse_settings(argv()))
    assert patience[0] >= timedelta(hours=1)


@pytest.mark.parametrize("kind", ["NO", "MULTI_GPU", "MULTI_CPU", "MULTI_XPU", "DEEPSPEED"])
def test_the_ways_of_the_configs_are_known(argv: Argv, kind: str) -> None:
    check(parse_settings(argv()), accelerator(DistributedType[kind], stage=2))


def test_one_process_cannot_share_out(argv: Argv) -> None:
    with pytest.raises(InputError, match="--fsdp shards the frozen model over several processes"):
        main(argv(fsdp=True))


@pytest.mark.parametrize(
    "name",
    ["StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "QwenImagePipeline", "SanaPipeline"],
)
def test_blocks_hold_most_of_a_denoiser_and_none_twice(name: str) -> None:
    pipeline = tiny_pipeline(name)
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    found = [id(parameter) for block in blocks(denoiser) for parameter in block.parameters()]
    assert len(found) == len(set(found))
    outside = {name.partition(".")[0] for name, p in denoiser.named_parameters() if id(p) not in set(found)}
    lists = {name.partition(".")[0] for name, module in denoiser.named_modules() if isinstance(module, nn.ModuleList)}
    assert found
    assert not outside & (lists | {"mid_block"})


@fully_shards_on_a_cpu
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_denoiser_of_each_family_can_be_shared_out(name: str) -> None:
    whole, shared = make_family(make_pipeline(name)), make_family(make_pipeline(name))
    shard_frozen_weights(shared.denoiser, torch.device("cpu"))
    assert any(isinstance(parameter, DTensor) for parameter in shared.denoiser.parameters())
    gradients = []
    for family in (whole, shared):
        add_adapters(family, family.settings, PROMPTS[0])
        latents = family.sample_latents(family.encode_images(pixels()), generators(0, 1))
        conditions = family.conditions(PROMPTS)
        errors = family.errors(family.denoiser, latents, conditions, sizes_of(SIDE, SIDE), generators(0, 1))
        gradients.append(torch.autograd.grad(errors.sum(), coeff_parameters(family.denoiser)))
        assert all(p.grad is None for p in family.denoiser.parameters())
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)  # of weights that lie otherwise in memory


# The files


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_config_is_one_that_accelerate_reads(path: Path) -> None:
    config = load_config_from_file(str(path))  # raises for a key that it does not know
    assert isinstance(config, ClusterConfig)
    kinds = {"one_gpu.yaml": "NO", "deepspeed_zero2.yaml": "DEEPSPEED"}
    assert config.mixed_precision == ("no" if path.name == "deepspeed_zero2.yaml" else "bf16")
    assert config.distributed_type == kinds.get(path.name, "MULTI_GPU")
    assert f"training/configs/{path.name}" in path.read_text()
    assert f"(../training/configs/{path.name})" in (ROOT / "docs" / "distributed.md").read_text()
