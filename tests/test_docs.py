"""What the pages show is run: Python after ```python, block after block; commands are at least understood."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import partialmethod
from pathlib import Path
from typing import Any, get_type_hints

import diffusers
import pytest
import tiny_models
from hosts import HOSTS, randomise
from PIL import Image
from tiny_sd import tiny_pipeline

import coeff_diffusers
from coeff_diffusers import add_coeff_adapter, load_coeff_weights, save_coeff_weights, training, unload_coeff_weights
from coeff_diffusers.cli import main, make_parser
from coeff_diffusers.commands import flags
from coeff_diffusers.training import parse_settings

ROOT = Path(__file__).parents[1]
FOLDERS = ("", "comfyui/", "docs/", "examples/", "examples/emoji/*/", "training/")
PAGES = {page.relative_to(ROOT).as_posix(): page for folder in FOLDERS for page in ROOT.glob(f"{folder}*.md")}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page].read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


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


@pytest.fixture(autouse=True)
def few_steps(monkeypatch) -> None:
    """Two steps a call instead of fifty."""
    for scheduler in (diffusers.DDIMScheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        short = partialmethod(two_timesteps, scheduler.set_timesteps)
        monkeypatch.setattr(scheduler, "set_timesteps", short)


def two_timesteps(self: Any, set_timesteps: Any, steps: int, **options: Any) -> None:
    set_timesteps(self, 2, **options)


# What a page takes for granted: the names that its blocks find, and the files.


def in_a_clone(pipe: Any) -> dict[str, Any]:
    for folder in ("model", "model_dit", "coefficients"):
        shutil.copytree(ROOT / "examples" / "emoji" / folder, f"examples/emoji/{folder}")
    Path("outputs/my-dog").mkdir(parents=True)
    shutil.copy("examples/emoji/coefficients/fox.safetensors", "outputs/my-dog")
    return {}


def with_dog(pipe: Any) -> dict[str, Any]:
    load_coeff_weights(pipe, "files/dog.safetensors")
    return {"pipe": pipe}


def with_pets(pipe: Any) -> dict[str, Any]:
    for name, file in (("rex", "dog"), ("tom", "cat")):
        Path("outputs/pets", name).mkdir(parents=True)
        Path(f"files/{file}.safetensors").rename(Path("outputs/pets", name, "pytorch_coeff_weights.safetensors"))
    return {"pipe": pipe}


def with_two_text_encoders(pipe: Any) -> dict[str, Any]:
    xl = tiny_models.tiny_pipeline("StableDiffusionXLPipeline")
    add_coeff_adapter(xl, adapter_name="dog")
    return {"pipe": xl}


def with_images_and_a_model(pipe: Any) -> dict[str, Any]:
    pipe.save_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
    for number in (1, 2):
        Image.new("RGB", (16, 16), "red").save(f"{number}.jpg")
    return {}


SETTINGS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "README.md": in_a_clone,
    "docs/adapters.md": lambda pipe: {"pipe": pipe},
    "docs/attention_maps.md": with_dog,
    "docs/compatibility.md": with_two_text_encoders,
    "docs/file_format.md": lambda pipe: {},
    "docs/getting_started.md": in_a_clone,
    "docs/how_it_works.md": lambda pipe: {"transformer": HOSTS["flux"].build()},
    "docs/subjects.md": with_pets,
    "docs/training.md": with_images_and_a_model,
    "examples/emoji/model/README.md": in_a_clone,
    "examples/emoji/model_dit/README.md": in_a_clone,
}
SHORTER = {"max_train_steps=500": "max_train_steps=2", "a sks dog on grass": "a dog", "a sks dog on a sofa": "a dog"}
ELSEWHERE = {"in_xs = {": "test_host_pipelines.py, on both pipelines that it is for"}


def test_every_page_with_python_has_its_setting() -> None:
    assert sorted(page for page in PAGES if blocks(page, "python")) == sorted(SETTINGS)


@pytest.mark.parametrize("page", SETTINGS)
def test_every_python_block_runs_after_the_one_before(page, pipe) -> None:
    names = SETTINGS[page](pipe)
    for block in blocks(page, "python"):
        if not any(words in block for words in ELSEWHERE):
            for long, short in SHORTER.items():
                block = block.replace(long, short)
            exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize("page", PAGES)
def test_python_that_is_not_run_is_python_and_imports_names_that_exist(page) -> None:
    for block in blocks(page, "py"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module in ("coeff_diffusers", "coeff_diffusers.training"):
                assert not [alias.name for alias in node.names if not hasattr(sys.modules[node.module], alias.name)]


def commands(page: str) -> list[list[str]]:
    """`coeff-diffusers` with its arguments, as often as a page has it."""
    lines = re.sub(r"\\\n", " ", "\n".join(blocks(page, "bash"))).splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [found for found in words if found[:1] == ["coeff-diffusers"]]


def parser_of(command: str) -> Callable[[list[str]], Any]:
    """What reads the flags of a command."""
    if command == "train":
        return parse_settings
    if package := {"app": "app", "serve": "serving"}.get(command):
        command_flags = pytest.importorskip(f"coeff_diffusers.{package}.settings")
    else:
        command_flags = flags
    return getattr(
        command_flags, f"parse_{command}", lambda arguments: make_parser().parse_args([command, *arguments])
    )


REST = {  # what may stand for "..."
    "generate": ["--pretrained_model_name_or_path", "model", "--coeff_weights", "file", "--prompt", "words"],
}


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_every_command_is_understood(page) -> None:
    for _, command, *given in commands(page):
        parse, rest = parser_of(command), REST.get(command, ["..."])
        arguments = [each for argument in given for each in (rest if argument == "..." else [argument])]
        if "..." in arguments or {"--config", "--subjects"} & set(arguments):  # not whole; files that would be read
            known = {setting.name for setting in fields(get_type_hints(parse)["return"])} | {"config"}
            assert {flag[2:].removeprefix("no_") for flag in arguments if flag.startswith("--")} <= known
        else:
            parse(arguments)


def test_every_command_on_files_runs(pipe, capsys) -> None:
    pytest.importorskip("matplotlib")
    found = commands("docs/adapters.md")
    assert len(found) == 8
    for _, *arguments in found:
        assert main(arguments) == 0, capsys.readouterr().err
    assert Path("files/dog.png").exists()


def raised_texts() -> list[str]:
    """Every text of the package, with `...` for what an f-string puts in."""
    found = []
    for path in (ROOT / "coeff_diffusers").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return [re.sub(r"%[\w.]*[dsrg]", "...", text) for text in found]


def test_the_messages_of_the_troubleshooting_page_are_those_of_the_package() -> None:
    text = PAGES["docs/troubleshooting.md"].read_text(encoding="utf-8")
    messages = [message for message in re.findall(r"^### `(.*)`$", text, re.MULTILINE) if "CUDA" not in message]
    assert len(messages) > 30
    texts = "\n".join(raised_texts())
    for message in messages:
        parts = [re.escape(part.strip()) for part in message.split("...") if part.strip(" :;'")]
        assert re.search(".*?".join(parts), texts), message


def test_every_public_name_is_on_the_page_of_the_api() -> None:
    text = PAGES["docs/api.md"].read_text(encoding="utf-8")
    entries = re.findall(r"^::: coeff_diffusers\.(.*)$", text, re.MULTILINE)
    public = [*coeff_diffusers.__all__, *(f"training.{name}" for name in training.__all__)]
    assert sorted(entries) == sorted(public)


def test_the_drawing_is_what_its_script_draws(monkeypatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs" / "site")
    import drawing

    assert drawing.FILE.read_text(encoding="utf-8") == drawing.drawing()
