"""Which optimizer a run gets, and what is refused before anything is loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from prodigyopt import Prodigy
from running import main
from safetensors.torch import load_file
from torch import nn

from coeff_diffusers.training.errors import InputError
from coeff_diffusers.training.run.checkpoints import Checkpoint, check_same_run
from coeff_diffusers.training.run.dreambooth import TrainingResult
from coeff_diffusers.training.run.optimizers import check_optimizer, make_optimizer, rates_in_use
from coeff_diffusers.training.settings import DreamBoothSettings, parse_settings

Train = Callable[..., TrainingResult]
REQUIRED = {"pretrained_model_name_or_path": "model", "instance_data_dir": "in", "instance_prompt": "a sks dog"}


def settings(**changes: Any) -> DreamBoothSettings:
    return DreamBoothSettings(**{**REQUIRED, **changes})


def parameters() -> dict[str, list[nn.Parameter]]:
    """Coefficients of 8 heads, and a LoRA matrix of 4,096 numbers."""
    return {"coefficients": [nn.Parameter(torch.zeros(8, 8))], "lora": [nn.Parameter(torch.ones(4, 1024))]}


def step_towards(optimizer: torch.optim.Optimizer, target: float) -> float:
    """One step on the sum of squared distances, which is returned."""
    values = [p for group in optimizer.param_groups for p in group["params"]]
    loss = sum((p - target).square().sum() for p in values)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def test_each_kind_of_parameters_has_its_own_rate_and_decay() -> None:
    changes = {"learning_rate": 0.3, "lora_learning_rate": 0.02, "adam_weight_decay": 0.1, "lora_weight_decay": 0.2}
    given = parameters()
    adamw = {"optimizer": "adamw", "adam_beta1": 0.5, "adam_epsilon": 1e-3}
    optimizer = make_optimizer(given, settings(**changes, **adamw, lora_rank=4))
    assert type(optimizer) is torch.optim.AdamW
    assert [(g["lr"], g["weight_decay"], g["betas"], g["eps"]) for g in optimizer.param_groups] == [
        (0.3, 0.1, (0.5, 0.999), 1e-3),
        (0.02, 0.2, (0.5, 0.999), 1e-3),
    ]
    assert [group["params"] for group in optimizer.param_groups] == list(given.values())


def test_a_lora_alone_has_the_loras_rate() -> None:
    optimizer = make_optimizer({"lora": parameters()["lora"]}, settings(coeff=False, lora_rank=4))
    assert [group["lr"] for group in optimizer.param_groups] == [1e-4]


# Prodigy


def test_prodigy_gets_its_options_and_one_rate() -> None:
    chosen = settings(
        optimizer="prodigy",
        lora_rank=4,
        prodigy_beta3=0.9,
        prodigy_decouple=False,
        prodigy_use_bias_correction=False,
        prodigy_safeguard_warmup=False,
        adam_beta1=0.8,
        lora_weight_decay=0.2,
    )
    optimizer = make_optimizer(parameters(), chosen)
    assert isinstance(optimizer, Prodigy)
    names = ("lr", "beta3", "decouple", "use_bias_correction", "safeguard_warmup", "betas", "weight_decay")
    first, second = ([group[name] for name in names] for group in optimizer.param_groups)
    assert first == [1.0, 0.9, False, False, False, (0.8, 0.999), 0.0]
    assert second == [*first[:-1], 0.2]


def test_prodigy_finds_a_rate_and_reports_it() -> None:
    optimizer = make_optimizer(parameters(), settings(optimizer="prodigy", lora_rank=4))
    start = rates_in_use(optimizer)
    losses = [step_towards(optimizer, 0.3) for _ in range(150)]
    assert losses[-1] < 0.01 * losses[0]
    assert start == [1e-6, 1e-6]
    assert rates_in_use(optimizer)[0] > 1e-2


def test_prodigy_trains_coefficients_and_lora(train: Train) -> None:
    result = train(learning_rate=None, lora_rank=2, max_train_steps=6, lr_scheduler="cosine", optimizer="Prodigy")
    assert (result.settings.learning_rate, result.settings.lora_learning_rate) == (1.0, 1.0)
    for file in (result.coeff_file, result.lora_file):
        assert all(value.any() for value in load_file(file).values())
    # it starts with steps of 1e-6, where AdamW would be at 0.01
    assert max(value.abs().max() for value in load_file(result.coeff_file).values()) < 1e-4


# By name


@pytest.mark.parametrize(
    ("name", "package", "args"),
    [
        ("SGD", "torch", {"momentum": 0.9}),
        ("adafactor", "torch", {}),
        ("soap", "coeff_diffusers", {"precondition_frequency": 1, "betas": (0.9, 0.9), "max_precondition_dim": 64}),
        ("Lion", "pytorch_optimizer", {"weight_decay": 0.125}),
        ("lion8bit", "bitsandbytes", {}),
    ],
)
def test_an_optimizer_of_any_of_the_packages_minimises_with_its_rates_and_arguments(
    name: str, package: str, args: dict[str, Any]
) -> None:
    texts = [f"{key}={value!r}" for key, value in args.items()]
    rates = {"learning_rate": 0.01, "lora_learning_rate": 0.005}
    chosen = settings(optimizer=name, lora_optimizer=name, optimizer_args=texts, lora_rank=4, **rates)
    check_optimizer(chosen)
    optimizer = make_optimizer(parameters(), chosen)
    assert type(optimizer).__module__.startswith(package)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.005]
    for group in optimizer.param_groups:
        assert {key: group[key] for key in args if key in group} == {
            key: value for key, value in args.items() if key in group
        }
    losses = [step_towards(optimizer, 0.3) for _ in range(20)]
    assert losses[-1] < losses[0]


def test_adams_flags_are_for_adams_alone() -> None:
    chosen = settings(optimizer="lion", adam_weight_decay=0.25)
    (group,) = make_optimizer({"coefficients": [nn.Parameter(torch.zeros(2, 2))]}, chosen).param_groups
    assert (group["betas"], group["weight_decay"]) == ((0.9, 0.99), 0.25)


def test_a_run_by_soap_and_adamw_resumes_to_the_same_bits(train: Train, tmp_path: Path) -> None:
    """Under a schedule that changes the rates of both."""
    flags = {"optimizer": "soap", "max_train_steps": 4, "optimizer_args": ["precondition_frequency=2"]}
    flags |= {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 3, "lora_rank": 2, "lora_learning_rate": 0.1}
    whole = train(**flags, output_dir=tmp_path / "whole")
    train(**flags | {"max_train_steps": 2}, checkpointing_steps=2)
    resumed = train(**flags, resume_from_checkpoint="latest")
    assert resumed.losses == whole.losses
    for file, other in ((resumed.coeff_file, whole.coeff_file), (resumed.lora_file, whole.lora_file)):
        found, expected = load_file(file), load_file(other)
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({"optimizer": "sdg"}, "--optimizer: there is no sdg in torch.optim, bitsandbytes or pytorch-optimizer"),
        ({"optimizer": "lbfgs"}, "--optimizer lbfgs: .*closure"),
        ({"optimizer": "schedulefreeadamw"}, "--optimizer schedulefreeadamw keeps other weights for training"),
        ({"optimizer_args": ["lr"]}, "--optimizer_args: 'lr' is not name=value"),
        ({"optimizer_args": ["amsgrad=yes"]}, "--optimizer_args: 'amsgrad=yes' is not name=value"),
        (
            {"optimizer": "adamw", "optimizer_args": ["amsgrat=True"]},
            "--optimizer_args: adamw has no amsgrat; it has lr, betas, eps",
        ),
        ({"optimizer": "soap", "optimizer_args": ["frequency=2"]}, "soap has no frequency; it has lr, betas"),
        ({"optimizer": "adamw", "optimizer_args": ["betas=(2.0, 0.9)"]}, "--optimizer adamw: Invalid beta parameter"),
        ({"optimizer": "adan", "optimizer_args": ["betas=(0.9,)"]}, "--optimizer adan: tuple index out of range"),
    ],
)
def test_an_optimizer_that_cannot_be_had_is_refused(flags: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        check_optimizer(settings(**flags))


# Coefficients and LoRA with an optimizer each


@pytest.mark.parametrize(
    ("flags", "of_coefficients", "of_lora"),
    [
        ({"optimizer": "soap"}, "soap", "adamw"),
        ({"optimizer": "soap", "lora_optimizer": "SOAP"}, "soap", "soap"),
        ({"optimizer": "soap", "coeff": False}, "soap", "soap"),
        ({"optimizer": "prodigy"}, "prodigy", "prodigy"),
        ({"lora_optimizer": "prodigy"}, "soap", "prodigy"),
        ({}, "soap", "adamw"),
        ({"coeff": False}, "adamw", "adamw"),
        ({"optimizer": "adamw"}, "adamw", "adamw"),
    ],
)
def test_a_lora_has_the_optimizer_of_the_coefficients_but_for_soap(
    flags: dict[str, Any], of_coefficients: str, of_lora: str
) -> None:
    chosen = settings(**flags, lora_rank=4)
    assert (chosen.optimizer, chosen.lora_optimizer) == (of_coefficients, of_lora)
    assert chosen.lora_learning_rate == (1.0 if of_lora == "prodigy" else 1e-4)
    of_rest = {"prodigy": (1.0, 0.0, "constant"), "adamw": (0.01, 0.0, "constant"), "soap": (0.04, 0.3, "cosine")}
    expected = of_rest[of_coefficients] if chosen.coeff else of_rest["adamw"]
    assert (chosen.learning_rate, chosen.adam_weight_decay, chosen.lr_scheduler) == expected


def test_each_optimizer_has_its_own_rates_and_betas_and_groups_keep_their_order() -> None:
    kinds = ("coefficients", "lora", "text_encoder_coefficients", "text_encoder_lora")
    given = {kind: [nn.Parameter(torch.zeros(4, 4))] for kind in kinds}
    optimizer = make_optimizer(given, settings(optimizer="soap", lora_rank=4, train_text_encoder=True))
    assert [group["params"] for group in optimizer.param_groups] == list(given.values())
    assert [group["betas"][1] for group in optimizer.param_groups] == [0.99, 0.999, 0.99, 0.999]
    assert rates_in_use(optimizer) == [0.04, 1e-4, 1e-3, 5e-6]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 1e-2, 0.3, 1e-3]
    losses = [step_towards(optimizer, 0.3) for _ in range(20)]
    assert losses[-1] < losses[0]
    assert all(parameter.any() for (parameter,) in given.values())


def test_what_several_optimizers_have_is_loaded_into_each() -> None:
    chosen = settings(optimizer="soap", lora_rank=4)
    optimizer, again = (make_optimizer(parameters(), chosen) for _ in range(2))
    step_towards(optimizer, 0.3)
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    again.load_state_dict(optimizer.state_dict())
    assert rates_in_use(again) == [0.5, 0.5]
    states = [[o.state_dict()["state"][0] for o in each.optimizers] for each in (optimizer, again)]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    with pytest.raises(ValueError, match="shorter"):
        again.load_state_dict({"optimizers": optimizer.state_dict()["optimizers"][:1]})


def test_a_beta_that_is_given_is_for_both() -> None:
    optimizer = make_optimizer(parameters(), settings(optimizer="soap", lora_rank=4, adam_beta2=0.9))
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.9), (0.9, 0.9)]


def test_arguments_are_for_the_optimizer_of_the_coefficients() -> None:
    chosen = settings(optimizer="soap", lora_rank=4, optimizer_args=["precondition_frequency=3"])
    first, second = make_optimizer(parameters(), chosen).param_groups
    assert first["precondition_frequency"] == 3
    assert "precondition_frequency" not in second


def test_a_loras_optimizer_that_cannot_be_had_is_refused() -> None:
    with pytest.raises(InputError, match="--lora_optimizer lbfgs: .*closure"):
        check_optimizer(settings(lora_optimizer="lbfgs", lora_rank=4))


def test_checkpoints_of_when_there_was_one_optimizer_go_on() -> None:
    chosen = asdict(settings(optimizer="lion", lora_rank=4, seed=0, max_train_steps=3))
    facts = {"settings": chosen, "processes": 1, "images": []}
    old = {name: value for name, value in chosen.items() if name != "lora_optimizer"}
    checkpoint = Checkpoint(
        Path("checkpoint-1"), {"facts": facts | {"settings": old, "denoiser": ""}, "losses": [1.0]}
    )
    check_same_run(checkpoint, facts | {"denoiser": ""})
    changed = facts | {"settings": chosen | {"lora_optimizer": "adamw"}, "denoiser": ""}
    with pytest.raises(InputError, match="--lora_optimizer was lion, is adamw"):
        check_same_run(checkpoint, changed)


# 8 bits


def test_8_bits_are_for_the_lora_beside_soap() -> None:
    optimizer = make_optimizer(parameters(), settings(optimizer="soap", use_8bit_adam=True, lora_rank=4))
    assert [type(each).__name__ for each in optimizer.optimizers] == ["SOAP", "AdamW8bit"]


def test_8_bits_are_for_the_lora_and_coefficients_keep_32() -> None:
    optimizer = make_optimizer(parameters(), settings(optimizer="adamw", use_8bit_adam=True, lora_rank=4))
    losses = [step_towards(optimizer, 0.3) for _ in range(2)]
    assert losses[1] < losses[0]
    dtypes = [
        {value.dtype for name, value in optimizer.state[group["params"][0]].items() if name in ("state1", "state2")}
        for group in optimizer.param_groups
    ]
    assert dtypes == [{torch.float32}, {torch.uint8}]


def test_8_bit_adam_trains_coefficients_and_lora(train: Train, tmp_path: Path) -> None:
    flags = {"lora_rank": 2, "lora_learning_rate": 0.01}
    result, plain = train(**flags, use_8bit_adam=True), train(**flags, output_dir=tmp_path / "plain")
    for found, other in ((result.coeff_file, plain.coeff_file), (result.lora_file, plain.lora_file)):
        # all tensors of this model are small, so that bitsandbytes computes in 32 bits as AdamW does
        torch.testing.assert_close(load_file(found), load_file(other), rtol=1e-3, atol=1e-4)


# What is refused


@pytest.mark.parametrize(
    ("package", "flags"), [("prodigyopt", {"optimizer": "prodigy"}), ("bitsandbytes", {"use_8bit_adam": True})]
)
def test_a_missing_package_is_named_before_anything_is_loaded(
    argv: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    package: str,
    flags: dict[str, Any],
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", fail)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"needs {package}, which cannot be imported: .*; pip install {package}"):
        main(argv(**{"lora_rank": 2, "learning_rate": None} | flags))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"lora_optimizer": "soap", "use_8bit_adam": True, "lora_rank": 2},
            "--use_8bit_adam is for --lora_optimizer adamw",
        ),
        ({"use_8bit_adam": True}, "--use_8bit_adam would save nothing"),
        ({"prodigy_beta3": 0.9}, "--prodigy_beta3 needs --optimizer prodigy"),
        ({"prodigy_decouple": False}, "--prodigy_decouple needs --optimizer prodigy"),
        ({"optimizer": "prodigy", "prodigy_beta3": 1.0}, "--prodigy_beta3 must be in [0, 1), got 1.0"),
        ({"optimizer": "prodigy", "learning_rate": 1e-2}, "--learning_rate should be about 1 for --optimizer prodigy"),
        ({"optimizer": "prodigy", "scale_lr": True}, "--scale_lr is for --optimizer adamw"),
        ({"optimizer": "prodigy", "use_8bit_adam": True}, "--use_8bit_adam is for --lora_optimizer adamw"),
        (
            {"lora_optimizer": "prodigy", "lora_rank": 2, "lora_learning_rate": 1e-4},
            "--lora_learning_rate should be about 1 for --lora_optimizer prodigy",
        ),
        (
            {"lora_optimizer": "prodigy", "lora_rank": 2, "text_encoder_lora_lr": 0.5, "train_text_encoder": True},
            "--text_encoder_lora_lr must be the --lora_learning_rate for --lora_optimizer prodigy",
        ),
        (
            {"optimizer": "prodigy", "lora_rank": 2, "lora_learning_rate": 1e-4},
            "--lora_learning_rate must be the --learning_rate for --optimizer prodigy",
        ),
    ],
)
def test_what_does_not_go_together_is_named(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError) as error:
        settings(**changes)
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    assert lines[1].startswith(f"  {problem}")


def test_names_may_be_spelled_as_in_diffusers(tmp_path: Path) -> None:
    required = [f"--{name}={value}" for name, value in REQUIRED.items()]
    assert parse_settings([*required, "--optimizer", "AdamW"]) == settings(optimizer="adamw")
    (tmp_path / "a.yaml").write_text("optimizer: AdamW\n")
    assert parse_settings([*required, "--config", str(tmp_path / "a.yaml")]) == settings(optimizer="adamw")
