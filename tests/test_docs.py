"""What docs/ shows is run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from hosts import randomise
from tiny_sd import tiny_pipeline

from coeff_diffusers import add_coeff_adapter, save_coeff_weights, unload_coeff_weights
from coeff_diffusers.cli import main

ADAPTERS = Path(__file__).parents[1] / "docs" / "adapters.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", ADAPTERS.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def pipe(tmp_path, monkeypatch):
    """A pipeline with no adapter, in a folder with `files/dog.safetensors`, `files/cat.safetensors`, `files/model`."""
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    for seed, name in enumerate(("dog", "cat")):
        add_coeff_adapter(pipe, adapter_name=name)
        randomise(pipe, name, seed, scale=0.1)
        metadata = {"instance_prompt": f"a sks {name}"}
        file = f"{name}.safetensors"
        save_coeff_weights(pipe, tmp_path / "files", weight_name=file, adapter_name=name, metadata=metadata)
    unload_coeff_weights(pipe)
    pipe.unet.save_config(tmp_path / "files" / "model")
    monkeypatch.chdir(tmp_path)
    return pipe


def few_steps(pipe):
    """The pipeline with two steps a call instead of fifty."""
    set_timesteps = pipe.scheduler.set_timesteps
    pipe.scheduler.set_timesteps = lambda steps, **options: set_timesteps(2, **options)
    return pipe


def test_every_python_block_runs_after_the_one_before(pipe) -> None:
    names = {"pipe": few_steps(pipe)}
    assert len(blocks("python")) == 14
    for block in blocks("python"):
        exec(compile(block, str(ADAPTERS), "exec"), names)
    assert len(names["images"]) == 2


def test_every_command_runs(pipe, capsys) -> None:
    pytest.importorskip("matplotlib")
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(commands) == 8
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "coeff-diffusers"
        assert main(arguments) == 0, capsys.readouterr().err
    assert Path("files/dog.png").exists()
