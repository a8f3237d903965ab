"""Flags, and what a run answers to bad input: before training, with everything named."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from running import main

from coeff_diffusers.training.errors import InputError
from coeff_diffusers.training.settings import DreamBoothSettings, parse_settings
from coeff_diffusers.training.settings.dreambooth import hints

REQUIRED = {"pretrained_model_name_or_path": "model", "instance_data_dir": "in", "instance_prompt": "a sks dog"}
Argv = Callable[..., list[str]]


def settings(**changes: Any) -> DreamBoothSettings:
    return DreamBoothSettings(**{**REQUIRED, **changes})


def parsed(*flags: str) -> DreamBoothSettings:
    return parse_settings([*(f"--{name}={value}" for name, value in REQUIRED.items()), *flags])


@pytest.fixture
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was loaded before the input was checked")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", fail)


# Flags


def test_the_flags_defaults_are_the_dataclasses() -> None:
    assert parsed() == settings()


def test_a_text_alone_is_one_of_several() -> None:
    alone = {
        "validation_prompt": "a sks mug",
        "final_validation_prompt": "a sks mug",
        "coeff_kinds": "self",
        "coeff_include": "attn2",
        "coeff_exclude": "up_blocks.*",
    }
    assert settings(**alone) == settings(**{name: (value,) for name, value in alone.items()})
    for layers in ("to_q,to_v", "to_q to_v", " to_q, to_v ", ["to_q", "to_v"]):
        assert settings(lora_rank=1, lora_layers=layers).lora_layers == ("to_q", "to_v")


def test_settings_have_the_same_types_from_python_as_from_a_file() -> None:
    given = settings(output_dir=Path("out"), learning_rate="1e-3", lora_rank=1, lora_alpha=8)
    assert (given.output_dir, given.learning_rate, given.lora_alpha) == ("out", 1e-3, 8.0)
    assert "output_dir: out\n" in given.to_yaml()
    with pytest.raises(InputError) as error:
        settings(seed="3", max_train_steps=3.5, train_batch_size=True, validation_prompt=[1], lora_rank=None)
    assert str(error.value).splitlines()[1:] == [
        "  --lora_rank must be a whole number, got None",
        "  --seed must be a whole number, got '3'",
        "  --train_batch_size must be a whole number, got True",
        "  --max_train_steps must be a whole number, got 3.5",
        "  --validation_prompt must be text, got 1",
    ]


def test_flags_take_the_fields_types() -> None:
    flags = "--no_random_flip --lora_rank 4 --coeff_kinds self cross --center_crop --seed 0".split()  # noqa: SIM905
    found = parsed(*flags, "--coeff_dropout", "0.2", "--validation_prompt", "a dog", "two dogs", "--lora_alpha", "8")
    assert found == settings(
        seed=0,
        coeff_dropout=0.2,
        random_flip=False,
        lora_rank=4,
        coeff_kinds=("self", "cross"),
        center_crop=True,
        validation_prompt=("a dog", "two dogs"),
        lora_alpha=8.0,
    )


def test_every_flag_has_a_help_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_settings(["--help-all"])
    shown = " ".join(capsys.readouterr().out.split())
    for setting in fields(DreamBoothSettings):
        assert setting.metadata["help"].endswith(".")
        assert f"--{setting.name}" in shown


def test_help_folds_what_few_need_and_says_where_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_settings(["--help"])
    shown = capsys.readouterr().out
    assert "--learning_rate RATE" in shown
    assert "--lora_rank RANK" not in shown
    assert "--help-all shows --lora_rank, --lora_alpha" in shown


def test_a_misspelled_flag_is_answered_with_the_one_that_is_like_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--learnig_rate", "1e-3", "--lora_rnk=2")
    said = capsys.readouterr().err
    assert "did you mean --learning_rate, --lora_rank?" in said


def test_a_cut_off_flag_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--learning", "1")
    assert "unrecognized arguments: --learning" in capsys.readouterr().err


# The file


def configured(folder: Path, text: str, *flags: str) -> DreamBoothSettings:
    (folder / "run.yaml").write_text(text, encoding="utf-8")
    return parse_settings(["--config", str(folder / "run.yaml"), *flags])


def test_settings_are_saved_as_yaml_and_read_back(tmp_path: Path) -> None:
    given = settings(
        seed=0, instance_prompt="a: 'ä' # \n", coeff_include=("attn1",), adam_epsilon=1e-12, mixed_precision="no"
    )
    assert configured(tmp_path, given.to_yaml()) == given


def test_flags_win_over_the_file_and_defaults_do_not(tmp_path: Path) -> None:
    text = settings(seed=3, center_crop=True, coeff=False, lora_rank=4, learning_rate=1.0).to_yaml()
    found = configured(tmp_path, text, "--lora_rank", "2", "--no_center_crop", "--coeff", "--learning_rate", "0.01")
    assert found == settings(seed=3, lora_rank=2, optimizer="adamw")  # which the file says


def test_a_file_need_not_hold_every_setting_and_may_lack_none_that_is_required(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "pretrained_model_name_or_path: model\ninstance_data_dir: in\n"
    assert configured(tmp_path, text, "--instance_prompt", "a sks dog") == settings()
    with pytest.raises(SystemExit):
        configured(tmp_path, "instance_data_dir: in\n", "--instance_prompt", "a sks dog")
    assert "arguments are required: --pretrained_model_name_or_path" in capsys.readouterr().err


def test_epochs_on_the_command_line_take_the_place_of_the_files_steps(tmp_path: Path) -> None:
    saved = settings(max_train_steps=7).to_yaml()
    assert configured(tmp_path, saved, "--num_train_epochs", "2") == settings(num_train_epochs=2)
    saved = settings(num_train_epochs=2).to_yaml()
    assert configured(tmp_path, saved, "--max_train_steps", "7") == settings(max_train_steps=7)


def test_values_as_people_write_them_are_understood(tmp_path: Path) -> None:
    required = "".join(f"{name}: {value}\n" for name, value in REQUIRED.items())
    text = (
        "learning_rate: 1e-4\nmixed_precision: no\nvalidation_prompt: a dog\nadam_weight_decay: 2\nreport_to: none\n"
    )
    assert configured(tmp_path, required + text) == settings(
        learning_rate=1e-4, mixed_precision="no", validation_prompt=("a dog",), adam_weight_decay=2.0, report_to="none"
    )


def test_all_that_is_wrong_with_a_file_is_listed_with_file_and_key(tmp_path: Path) -> None:
    text = (
        "seed: 0\nlearning_rte: 1\ntrain_batch_size: '4'\nseed: 1\ncenter_crop: 1\nlearning_rate: high\n"
        "coeff_kinds: [self, 3]\ninstance_prompt:\nmax_train_steps: 1.5\nlora_rank: true\n"
        "lr_power: true\n? [class_prompt]\n: a dog\ninstance_data_dir: off\nvalidation_prompt: [a dog, no]\n"
        f"mode_scale: {'9' * 400}\n"
    )
    with pytest.raises(InputError) as error:
        configured(tmp_path, text)
    assert str(error.value).splitlines() == [
        f"--config: {tmp_path / 'run.yaml'}:",
        "  seed: is given twice",
        "  line 12: what stands before the colon must be text",
        "  learning_rte: is no setting; did you mean learning_rate?",
        "  train_batch_size: must be a whole number, got '4'",
        "  center_crop: must be true or false, got 1",
        "  learning_rate: must be a number, got 'high'",
        "  coeff_kinds: must be of self, cross, joint, got 3",
        "  instance_prompt: must be text, got None",
        "  max_train_steps: must be a whole number, got 1.5",
        "  lora_rank: must be a whole number, got True",
        "  lr_power: must be a number, got True",
        "  instance_data_dir: must be text, got False; yes, no, on and off are text in quotes",
        "  validation_prompt: must be text, got False; yes, no, on and off are text in quotes",
        f"  mode_scale: must be a number, got {'9' * 400}",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("- seed: 0\n", "must be lines of 'setting: value'"),
        ("seed: [0\n", "cannot be read: while parsing"),
        ("instance_prompt: 2020-13-45\n", "cannot be read: month must be in 1..12"),
        ("seed: !!python/object/apply:os.getcwd []\n", "cannot be read: could not determine a constructor"),
    ],
)
def test_a_file_of_another_kind_is_an_input_error(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(InputError, match=f"--config: {tmp_path / 'run.yaml'} {problem}"):
        configured(tmp_path, text)


def test_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--config: .*none.yaml cannot be read: .*No such file"):
        parse_settings(["--config", str(tmp_path / "none.yaml")])


# Values


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"train_batch_size": 0}, "--train_batch_size must be at least 1, got 0"),
        ({"seed": -1}, "--seed must be in [0, 2^32 - 1], got -1"),
        ({"seed": 2**32}, "--seed must be in [0, 2^32 - 1], got 4294967296"),
        ({"learning_rate": 0.0}, "--learning_rate must be above 0, got 0.0"),
        ({"learning_rate": float("nan")}, "--learning_rate must be a finite number, got nan"),
        ({"learning_rate": float("inf")}, "--learning_rate must be a finite number, got inf"),
        ({"coeff_dropout": 1.0}, "--coeff_dropout must be in [0, 1), got 1.0"),
        ({"coeff_kinds": ("self", "croos")}, "--coeff_kinds must be of self, cross, joint, got croos"),
        ({"mixed_precision": "fp8"}, "--mixed_precision must be of no, fp16, bf16, got fp8"),
        ({"lr_scheduler": "step"}, "--lr_scheduler must be of constant, constant_with_warmup, linear"),
        ({"background_color": "whit"}, "--background_color must be a colour such as white or #ffffff, got 'whit'"),
        ({"instance_prompt": " "}, "--instance_prompt must not be empty"),
        ({"with_prior_preservation": True, "class_prompt": "a"}, "--with_prior_preservation needs --class_data_dir"),
        ({"class_prompt": "a dog"}, "--class_prompt needs --with_prior_preservation"),
        ({"class_data_dir": "c"}, "--class_data_dir needs --with_prior_preservation"),
        ({"coeff": False}, "--no_coeff leaves nothing to train: give a --lora_rank of 1 or more"),
        ({"lora_alpha": 4.0}, "--lora_alpha needs a --lora_rank of 1 or more"),
        ({"max_train_steps": 3, "num_train_epochs": 1}, "--max_train_steps and --num_train_epochs exclude each other"),
        ({"lr_warmup_steps": 5, "lr_scheduler": "constant"}, "--lr_warmup_steps has no effect on constant"),
        (
            {"with_prior_preservation": True, "class_prompt": "a", "class_data_dir": "./in/"},
            "--instance_data_dir and --class_data_dir must be different folders",
        ),
        ({"output_dir": "./in"}, "--instance_data_dir and --output_dir must be different folders"),
        ({"output_dir": ""}, "--output_dir must be the name of a folder, got ''"),
        ({"lora_layers": "", "lora_rank": 2}, "--lora_layers must hold at least one pattern"),
    ],
)
def test_a_value_that_cannot_be_used_is_named(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError) as error:
        settings(**changes)
    lines = str(error.value).splitlines()
    assert lines[0] == "these settings cannot be used:"
    assert len(lines) == 2
    assert lines[1].startswith(f"  {problem}")


LORA_ALONE = {"coeff": False, "lora_rank": 4}
BUCKETS = {"aspect_ratio_buckets": "16,24"}


@pytest.mark.parametrize(
    ("idle", "problem", "beside", "way_out"),
    [
        ({"coeff_dropout": 0.1}, "is of the coefficients, which --no_coeff leaves out", LORA_ALONE, {"coeff": True}),
        ({"coeff_kinds": ("self",)}, "is of the coefficients", LORA_ALONE, {"coeff": True}),
        ({"coeff_include": ("attn1",)}, "is of the coefficients", LORA_ALONE, {"coeff": True}),
        ({"coeff_exclude": ("attn1",)}, "is of the coefficients", LORA_ALONE, {"coeff": True}),
        ({"lora_weight_decay": 0.1}, "needs a --lora_rank of 1 or more", {}, {"lora_rank": 4}),
        (
            {"adam_weight_decay_text_encoder": 0.1},
            "needs --train_text_encoder and a --lora_rank of 1 or more",
            {"train_text_encoder": True},
            {"lora_rank": 4},
        ),
        ({"adam_weight_decay_text_encoder": 0.1}, "needs --train_", {"lora_rank": 4}, {"train_text_encoder": True}),
        (
            {"num_class_images": 7},
            "needs --with_prior_preservation",
            {},
            {"with_prior_preservation": True, "class_data_dir": "class", "class_prompt": "a dog"},
        ),
        (
            {"prior_loss_weight": 0.5},
            "needs --with_prior_preservation",
            {},
            {"with_prior_preservation": True, "class_data_dir": "class", "class_prompt": "a dog"},
        ),
        (
            {"num_class_images": 7},
            "needs --with_prior_preservation",
            {"subjects": "a.yaml", "instance_data_dir": None, "instance_prompt": ""},
            {"with_prior_preservation": True},
        ),
        ({"ema_decay": 0.9}, "needs --use_ema", {}, {"use_ema": True}),
        ({"adam_beta1": 0.5}, "is for SOAP and optimizers with Adam", {"optimizer": "lion"}, {"optimizer": "adamax"}),
        ({"adam_beta2": 0.5}, "is for SOAP and", {"optimizer": "lion"}, {"lora_rank": 4, "lora_optimizer": "adamw"}),
        (
            {"optimizer_args": "momentum=0.5"},
            "is of the .*: the LoRA has --lora_optimizer lion$",
            LORA_ALONE | {"lora_optimizer": "lion"},
            {"lora_optimizer": "adamw"},
        ),
        (
            {"lr_num_cycles": 2},
            "needs --lr_scheduler cosine_with_restarts",
            {"lr_scheduler": "cosine"},
            {"lr_scheduler": "cosine_with_restarts"},
        ),
        ({"lr_power": 2.0}, "needs --lr_scheduler polynomial", {}, {"lr_scheduler": "polynomial"}),
        ({"logit_mean": 1.0}, "needs --weighting_scheme logit_normal", {}, {"weighting_scheme": "logit_normal"}),
        ({"logit_std": 2.0}, "needs --weighting_scheme logit_normal", {}, {"weighting_scheme": "logit_normal"}),
        ({"mode_scale": 1.0}, "needs --weighting_scheme mode", {}, {"weighting_scheme": "mode"}),
        (
            {"center_crop": True},
            "has no effect beside --aspect_ratio_buckets, which always crop at the centre",
            BUCKETS,
            {"aspect_ratio_buckets": None},
        ),
    ],
)
def test_a_setting_without_effect_is_refused_with_what_it_needs(
    idle: dict[str, Any], problem: str, beside: dict[str, Any], way_out: dict[str, Any]
) -> None:
    (name,) = idle
    with pytest.raises(InputError, match=f"used:\n  --{name} {problem}[^\n]*$"):
        settings(**beside | idle)
    settings(**beside)
    settings(**beside | idle | way_out)


@pytest.mark.parametrize(
    ("idle", "problem", "beside", "way_out"),
    [
        ("--learning_rate 0.1", "is of .*: use --lora_learning_rate", "--no_coeff --lora_rank 4", "--coeff"),
        ("--adam_weight_decay 0.1", "is of .*: use --lora_weight_decay", "--no_coeff --lora_rank 4", "--coeff"),
        ("--learning_rate 0.5", "is of the coeff", "--no_coeff --lora_rank 4", "--optimizer prodigy"),
        (
            "--text_encoder_lr 0.1",
            "is of .*: use --text_encoder_lora_lr",
            "--no_coeff --lora_rank 4 --train_text_encoder",
            "--coeff",
        ),
        ("--lora_learning_rate 0.1", "needs a --lora_rank of 1 or more", "", "--lora_rank 4"),
        ("--text_encoder_lora_lr 0.1", "needs a --lora_rank", "--train_text_encoder", "--lora_rank 4"),
        ("--resolution 64", "has no effect beside --as", "--aspect_ratio_buckets 16,24", "--validation_prompt a"),
        ("--validation_steps 7", "needs a --validation_prompt$", "", "--validation_prompt a"),
        (
            "--validation_steps 7",
            "needs a --validation_prompt$",
            "--final_validation_prompt a",
            "--validation_prompt a",
        ),
        ("--validation_epochs 7", "needs a --validation_prompt$", "", "--validation_prompt a"),
        (
            "--num_validation_images 7",
            "needs a --validation_prompt or --final_validation_prompt",
            "",
            "--final_validation_prompt a",
        ),
        ("--validation_num_inference_steps 7", "needs a --validation_prompt or", "", "--validation_prompt a"),
        ("--validation_guidance_scale 7", "needs a --validation_prompt or", "", "--validation_prompt a"),
    ],
)
def test_a_flag_without_effect_is_refused_on_the_command_line_and_read_from_a_runs_own_file(
    tmp_path: Path, idle: str, problem: str, beside: str, way_out: str
) -> None:
    name, value = idle.split()
    with pytest.raises(InputError, match=f"used:\n  {name} {problem}[^\n]*$"):
        parsed(*beside.split(), *idle.split())
    parsed(*beside.split(), *idle.split(), *way_out.split())
    text = parsed(*beside.split()).to_yaml().splitlines()
    filled_in = "".join(f"{line}\n" for line in text if not line.startswith(f"{name[2:]}:")) + f"{name[2:]}: {value}\n"
    assert getattr(configured(tmp_path, filled_in), name[2:]) == float(value)


def test_images_of_subjects_are_asked_for_in_their_file() -> None:
    flags = "--pretrained_model_name_or_path model --subjects a.yaml --num_validation_images 2 --validation_steps 3"
    assert parse_settings(flags.split()).validation_steps == 3


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_every_number_must_be_finite(value: str) -> None:
    names = [name for name, hint in hints(DreamBoothSettings).items() if re.search(r"\bfloat\b", str(hint))]
    assert len(names) > 20
    with pytest.raises(InputError) as error:
        parsed(*(f"--{name}={value}" for name in names))
    lines = str(error.value).splitlines()
    for name in names:
        assert f"  --{name} must be a finite number, got {value}" in lines
    assert len([line for line in lines if "must be" in line]) == len(names)


def test_all_problems_are_listed_at_once() -> None:
    with pytest.raises(InputError) as error:
        settings(train_batch_size=0, adam_beta1=1.5, report_to="wandbb", class_prompt="a")
    assert [line.split()[0] for line in str(error.value).splitlines()[1:]] == [
        "--train_batch_size",
        "--adam_beta1",
        "--report_to",
        "--class_prompt",
    ]


# Input that is not there, or not what it should be


@pytest.mark.usefixtures("nothing_loaded")
def test_a_missing_instance_folder_is_an_error_before_anything_is_loaded(argv: Argv, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"--instance_data_dir: {tmp_path / 'none'} does not exist"):
        main(argv(instance_data_dir=tmp_path / "none"))


@pytest.mark.usefixtures("nothing_loaded")
def test_a_class_file_that_is_no_image_is_an_error_before_anything_is_loaded(argv: Argv, tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "a.png").write_text("no image")
    flags = {"with_prior_preservation": True, "class_data_dir": tmp_path / "class", "class_prompt": "a fox"}
    with pytest.raises(InputError, match=r"--class_data_dir: these(.|\n)*class/a\.png: UnidentifiedImageError"):
        main(argv(**flags))


@pytest.mark.usefixtures("nothing_loaded")
@pytest.mark.parametrize("below", ["", "sub"])
def test_a_file_in_the_way_of_the_output_folder_is_an_error_before_anything_is_loaded(
    argv: Argv, tmp_path: Path, below: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=f"--output_dir: {tmp_path / 'file' / below} cannot be written: .*"):
        main(argv(output_dir=tmp_path / "file" / below))
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.usefixtures("nothing_loaded")
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_folder_without_permission_is_an_error_before_anything_is_loaded(argv: Argv, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(InputError, match="--output_dir: .*locked cannot be written: .*Permission denied"):
        main(argv(output_dir=tmp_path / "locked"))


@pytest.mark.usefixtures("nothing_loaded")
def test_somebodys_readme_in_the_output_folder_is_not_overwritten(argv: Argv, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(InputError, match="--output_dir: .* holds a README.md of no training run"):
        main(argv(output_dir=tmp_path))


@pytest.mark.usefixtures("nothing_loaded")
def test_an_output_folder_on_a_full_disk_is_an_error_before_anything_is_loaded(
    argv: Argv, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("coeff_diffusers.training.writing.tempfile.TemporaryFile", full)
    with pytest.raises(InputError, match="cannot be written: .*No space left on device"):
        main(argv())


@pytest.mark.usefixtures("nothing_loaded")
def test_a_pipeline_of_another_family_is_refused_with_those_supported(argv: Argv, tmp_path: Path) -> None:
    (tmp_path / "wan").mkdir()
    (tmp_path / "wan" / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    with pytest.raises(InputError, match="wan is a WanPipeline; supported are .*StableDiffusionPipeline"):
        main(argv(pretrained_model_name_or_path=tmp_path / "wan"))


@pytest.mark.usefixtures("nothing_loaded")
def test_a_revision_of_a_model_that_is_here_is_refused(argv: Argv) -> None:
    with pytest.raises(InputError, match="--revision is of a model on the Hub and has no effect on .*tiny-sd"):
        main(argv(revision="main"))


@pytest.mark.usefixtures("nothing_loaded")
def test_a_folder_without_a_pipeline_is_refused(argv: Argv, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--pretrained_model_name_or_path: there is no pipeline at"):
        main(argv(pretrained_model_name_or_path=tmp_path))


def test_a_variant_that_is_not_there_is_an_input_error(argv: Argv) -> None:
    with pytest.raises(InputError, match="--pretrained_model_name_or_path: .* cannot be loaded: .*variant=fp16"):
        main(argv(variant="fp16"))


@pytest.mark.parametrize("flag", ["instance_prompt", "class_prompt", "validation_prompt"])
def test_each_prompt_is_checked_for_its_length(argv: Argv, tmp_path: Path, flag: str) -> None:
    prior = {"with_prior_preservation": True, "class_data_dir": tmp_path / "class", "class_prompt": "a fox"}
    prompt = "a dog that is far too long"
    with pytest.raises(InputError, match=f"'{prompt}' has 22 tokens"):
        main(argv(**prior | {flag: prompt}))
    assert list((tmp_path / "class").iterdir()) == []


def test_a_pattern_without_a_layer_is_an_input_error(argv: Argv) -> None:
    with pytest.raises(InputError, match=r"the patterns \['attn3'\] match none"):
        main(argv(coeff_include="attn3"))


@pytest.mark.usefixtures("nothing_loaded")
@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA has float16")
def test_a_precision_that_the_device_lacks_is_an_input_error(argv: Argv) -> None:
    with pytest.raises(InputError, match="--mixed_precision fp16 needs a GPU, and this runs on cpu"):
        main(argv(mixed_precision="fp16"))
