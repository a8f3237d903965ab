"""Pushing to the Hub, against a server of this test that answers as the Hub does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline
from hub_server import Hub, hub_server
from running import main

from coeff_diffusers.training.errors import InputError
from coeff_diffusers.training.results import hub
from coeff_diffusers.training.run.dreambooth import TrainingResult
from coeff_diffusers.training.settings import DreamBoothSettings, parse_settings

server = hub_server
REQUIRED = {"pretrained_model_name_or_path": "model", "instance_data_dir": "in", "instance_prompt": "a sks dog"}


def settings(**changes: Any) -> DreamBoothSettings:
    return DreamBoothSettings(**{**REQUIRED, **changes})


def test_what_the_run_wrote_is_pushed_and_nothing_else(
    train: Callable[..., TrainingResult], tmp_path: Path, server: type[Hub], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "fox"
    for other in ("mine/0.png", ".hidden.safetensors", "validation/.part"):
        (out / other).parent.mkdir(parents=True, exist_ok=True)
        (out / other).write_text("not for the Hub")
    train(
        output_dir=out,
        push_to_hub=True,
        hub_token="hf_secret",
        report_to="tensorboard",
        max_train_steps=2,
        checkpointing_steps=1,
        validation_prompt=["a fox"],
        num_validation_images=1,
        validation_num_inference_steps=1,
    )
    logs = {name for name in server.files if name.startswith("logs/dreambooth/")}
    assert logs
    assert set(server.files) - logs == {
        "pytorch_coeff_weights.safetensors",
        "README.md",
        "config.yaml",
        "validation/step-000002/grid.png",
        "validation/step-000002/prompt0-image0.png",
    }
    assert 'load_coeff_weights(pipe, "me/fox")' in server.files["README.md"].decode()
    assert (out / "checkpoint-1" / "pytorch_coeff_weights.safetensors").exists()
    for name, content in server.files.items():
        assert content == (out / name).read_bytes()
        assert b"hf_secret" not in content
    assert server.requests[0][0] == "/api/repos/create"
    assert {token for _, token in server.requests} == {"Bearer hf_secret"}
    assert "Pushed: http://127.0.0.1:" in capsys.readouterr().out


def test_a_repository_that_cannot_be_made_is_an_error_before_class_images_are_made(
    argv: Callable[..., list[str]], tmp_path: Path, server: type[Hub]
) -> None:
    server.refuse = "/create"
    prior = {"with_prior_preservation": True, "class_data_dir": tmp_path / "class", "class_prompt": "a fox"}
    with pytest.raises(InputError, match=r"--push_to_hub: the repository you/fox cannot be .*(.|\n)*the rights"):
        main(argv(**prior, push_to_hub=True, hub_token="hf_secret", hub_model_id="you/fox"))
    assert not list((tmp_path / "class").iterdir())
    with pytest.raises(InputError, match="the repository not/a/name cannot be"):
        hub.open_repository(settings(push_to_hub=True, hub_token="hf_secret", hub_model_id="not/a/name"), tmp_path)


def test_a_push_that_fails_says_how_to_push_later(
    train: Callable[..., TrainingResult], tmp_path: Path, server: type[Hub]
) -> None:
    server.refuse = "/commit/"
    with pytest.raises(RuntimeError, match="the run is complete and in .*(.|\n)*hf upload me/fox .*out --exclude"):
        train(push_to_hub=True, hub_token="hf_secret", max_train_steps=1)
    assert (tmp_path / "out" / "config.yaml").exists()


def test_a_missing_token_is_an_error_before_anything_is_loaded(
    argv: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", fail)
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(InputError, match="--push_to_hub needs a token: log in by `hf auth login`, or set HF_TOKEN"):
        main(argv(push_to_hub=True))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"hub_model_id": "me/fox"}, "--hub_model_id needs --push_to_hub"),
        ({"hub_token": "hf_secret"}, "--hub_token needs --push_to_hub"),
        ({"push_to_hub": True, "hub_token": "hf_secret", "report_to": "wandb"}, "--hub_token would be in wandb's log"),
        ({"push_to_hub": True, "hub_token": "hf_secret", "report_to": "all"}, "--hub_token would be in wandb's log"),
    ],
)
def test_what_does_not_go_together_is_named(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError) as error:
        settings(**changes)
    assert [line.startswith(f"  {problem}") for line in str(error.value).splitlines()] == [False, True]
    assert "hf_secret" not in str(error.value)


def test_the_token_is_shown_and_saved_nowhere(tmp_path: Path) -> None:
    given = settings(push_to_hub=True, hub_token="hf_secret")
    assert "hf_secret" not in given.to_yaml() + repr(given) + str(given.public())
    (tmp_path / "a.yaml").write_text(given.to_yaml())
    assert parse_settings(["--config", str(tmp_path / "a.yaml"), "--hub_token", "hf_secret"]) == given
