"""Blocks of the frozen denoiser in the CPU's memory, and what they save there: the same run, by copies alone."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import FAMILIES, tiny_pipeline
from torch import nn

from coeff_diffusers import add_coeff_adapter, coeff_parameters
from coeff_diffusers.commands.flags import parse_generate
from coeff_diffusers.commands.generate import base_pipeline, load_pipeline
from coeff_diffusers.quantization import Quantization
from coeff_diffusers.serving.pipeline import SubjectPipeline
from coeff_diffusers.serving.settings import parse_serve
from coeff_diffusers.training.errors import InputError
from coeff_diffusers.training.run import offload
from coeff_diffusers.training.run.dreambooth import DreamBoothRun, TrainingResult
from coeff_diffusers.training.run.offload import GroupOffload, offloadable_blocks
from coeff_diffusers.training.settings.command_line import parse_settings

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
    monkeypatch.setattr(offload, "_copy", lambda each, device: copy.deepcopy(right.get(id(each), each)))
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
        ("gradient_checkpointing", "offload_activations", "checkpoint_every"): "would copy the weights of all blocks",
    }.items():
        with pytest.raises(InputError, match=said):
            train(**{flag: 2 if flag == "checkpoint_every" else True for flag in flags})


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


def test_a_run_goes_on_with_it_and_without(train: Train, tmp_path: Path) -> None:
    changes = {"max_train_steps": 2, "checkpointing_steps": 1}
    whole = train(**changes, output_dir=tmp_path / "whole")
    flags = {"group_offload": True, "offload_activations": True, "output_dir": tmp_path / "more"}
    the_same(train(**changes, **flags, resume_from_checkpoint=tmp_path / "whole" / "checkpoint-1"), whole)


def test_the_denoiser_is_offloaded_as_soon_as_it_is_loaded(
    argv: Callable[..., list[str]], poisoned: list[nn.Module]
) -> None:
    """Class images are made by it, and text encoders that train are put where it says that it is."""
    run = DreamBoothRun(parse_settings(argv(group_offload=True)))
    run.load_model()
    assert poisoned


def quantised_flux(folder: Path, method: str) -> Any:
    tiny_pipeline("FluxPipeline").save_pretrained(folder)
    return base_pipeline(str(folder), None, "float32", Quantization(method), "cpu").transformer.requires_grad_(False)


def devices_of(parameters: Iterable[Any]) -> set[str]:
    parts = [part for each in parameters for part in offload._parts(each)]
    assert {type(part) for part in parts} <= {torch.Tensor, nn.Parameter}  # which alone know `record_stream`
    return {part.device.type for part in parts}


@pytest.mark.parametrize("method", ["torchao_int8", "quanto_int8"])
def test_what_quantised_weights_are_made_of_is_moved(method: str, tmp_path: Path) -> None:
    """Their `data` cannot be set to that of another device, and they know no `record_stream`."""
    flux = quantised_flux(tmp_path, method)
    offloaded = GroupOffload(flux, torch.device("meta"))
    blocks = offloadable_blocks(flux)
    at_home = {id(p) for block in blocks for p in block.parameters()}
    assert devices_of(p for p in flux.parameters() if id(p) in at_home) == {"cpu"}
    assert devices_of(p for p in flux.parameters() if id(p) not in at_home) == {"meta"}
    assert devices_of(offloaded._copied(blocks[0]).values()) == {"meta"}


def test_weights_of_four_bits_are_let_go_after_the_forward_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes' own function keeps them until the graph is gone."""
    flux = quantised_flux(tmp_path, "bnb_nf4")
    add_coeff_adapter(flux)
    GroupOffload(flux, torch.device("cpu"))
    brought: list[Any] = []

    def remember(parameter: Any, device: torch.device) -> Any:
        made = copy.deepcopy(parameter)
        brought.append(weakref.ref(made.untyped_storage()))
        return made

    monkeypatch.setattr(offload, "_copy", remember)
    loss = block_output(offloadable_blocks(flux)[0], flux)
    assert brought
    assert not [each for each in brought if each() is not None]
    loss.backward()
    assert coeff_parameters(flux)[0].grad is not None
    assert not [each for each in brought if each() is not None]
