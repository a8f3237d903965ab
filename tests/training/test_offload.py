"""Blocks of the frozen denoiser in the CPU's memory, and what they save there: the same run, by copies alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import FAMILIES, tiny_pipeline
from torch import nn

from coeff_diffusers import add_coeff_adapter, coeff_parameters
from coeff_diffusers.commands.flags import parse_generate
from coeff_diffusers.commands.generate import load_pipeline
from coeff_diffusers.serving.pipeline import SubjectPipeline
from coeff_diffusers.serving.settings import parse_serve
from coeff_diffusers.training.errors import InputError
from coeff_diffusers.training.run import offload
from coeff_diffusers.training.run.dreambooth import TrainingResult
from coeff_diffusers.training.run.offload import GroupOffload, offloadable_blocks

Train = Callable[..., TrainingResult]


def coefficients(result: TrainingResult) -> dict[str, torch.Tensor]:
    assert result.coeff_file is not None
    return load_file(result.coeff_file)


def the_same(one: TrainingResult, other: TrainingResult) -> None:
    assert one.losses == other.losses
    torch.testing.assert_close(coefficients(one), coefficients(other), rtol=0, atol=0)


def denoiser_of(pipeline: Any) -> Any:
    return getattr(pipeline, "unet", None) or pipeline.transformer


@pytest.mark.parametrize("name", FAMILIES)
def test_the_blocks_hold_nearly_all_weights_of_each_family(name: str) -> None:
    denoiser = denoiser_of(tiny_pipeline(name))
    blocks = offloadable_blocks(denoiser)
    inside = [id(parameter) for block in blocks for parameter in block.parameters()]
    attention = [m for m in denoiser.modules() if getattr(m, "processor", None) is not None]
    assert len(inside) == len(set(inside))
    assert blocks
    assert {id(p) for each in attention for p in each.parameters()} <= set(inside)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """What stays at home are NaNs, as on another device it would be out of reach; the blocks that there are."""
    right: dict[int, Any] = {}
    blocks: list[nn.Module] = []
    to_host = offload._to_host

    def poison(parameters: Any, pin: bool) -> None:
        to_host(parameters, pin)
        blocks.extend(module for module, _ in parameters)
        for parameter in parameters.values():
            right[id(parameter)] = copy.deepcopy(parameter)
            parameter.data.fill_(float("nan"))

    monkeypatch.setattr(offload, "_to_host", poison)
    monkeypatch.setattr(offload, "_copy", lambda parameter, device: copy.deepcopy(right[id(parameter)]))
    return blocks


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}, {"offload_activations": True}], ids=lambda c: "".join(c))
def test_the_run_is_the_same_to_the_bit_and_never_computes_with_what_stayed_behind(
    train: Train, poisoned: list[nn.Module], tmp_path: Path, changes: dict[str, Any]
) -> None:
    without = train(**changes | {"offload_activations": None})
    assert not poisoned
    shown = {"validation_prompt": ["a fox"], "validation_num_inference_steps": 1}
    the_same(train(**changes, **shown, group_offload=True, output_dir=tmp_path / "offloaded"), without)
    assert poisoned


def test_a_block_is_there_while_it_computes_and_at_home_after(monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = denoiser_of(tiny_pipeline("FluxPipeline")).requires_grad_(False)
    add_coeff_adapter(denoiser)
    home = {id(p) for block in offloadable_blocks(denoiser) for p in block.parameters()}
    seen: list[list[int]] = []

    def note(module: nn.Module, *_: Any) -> None:
        away = [b for b, block in enumerate(blocks) if any(id(p) not in home for p in block.parameters())]
        seen.append(away)

    blocks = offloadable_blocks(denoiser)
    for block in blocks:
        next(m for m in block.modules() if isinstance(m, nn.Linear)).register_forward_hook(note)
    monkeypatch.setattr(offload, "_copy", lambda parameter, device: copy.deepcopy(parameter))
    GroupOffload(denoiser, torch.device("cpu"))
    loss = sum(block_output(block, denoiser) for block in blocks)
    loss.backward()
    assert seen == [[b] for b in [*range(len(blocks)), *reversed(range(len(blocks)))]]
    assert {id(p) for block in blocks for p in block.parameters()} == home
    assert all(p.grad is not None and p.grad.any() for p in coeff_parameters(denoiser))


def block_output(block: Any, denoiser: Any) -> torch.Tensor:
    width = denoiser.config.num_attention_heads * denoiser.config.attention_head_dim
    image, text, temb = torch.randn(1, 6, width), torch.randn(1, 4, width), torch.randn(1, width)
    return sum(part.square().sum() for part in block(image, text, temb))


def test_what_does_not_go_together(train: Train) -> None:
    for flags, said in {
        ("group_offload", "fsdp"): "shards stay on their devices",
        ("offload_activations",): "needs --gradient_checkpointing or --group_offload",
    }.items():
        with pytest.raises(InputError, match=said):
            train(**dict.fromkeys(flags, True))


def test_generate_and_serve_take_the_flag_and_make_the_same_images(train: Train, base: Path) -> None:
    file = train(lora_rank=2).coeff_file
    assert file is not None
    model = ["--pretrained_model_name_or_path", str(base)]
    of_file = ["--coeff_weights", str(file), "--lora_weights", str(file.parent), "--prompt", "a fox"]
    made = []
    for flags in ([], ["--group_offload"]):
        pipe = load_pipeline(parse_generate([*model, *of_file, *flags]), {"default": file}, "cpu")
        generator = torch.Generator().manual_seed(0)
        made.append(pipe("a sks fox", num_inference_steps=2, output_type="np", generator=generator).images)
    assert (made[0] == made[1]).all()
    served = SubjectPipeline(parse_serve([*model, "--adapters", str(file.parent), "--group_offload"])).pipe
    for unet in (pipe.unet, served.unet):
        assert any(getattr(module, "_diffusers_hook", None) is not None for module in unet.modules())
