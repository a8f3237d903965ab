"""The short scripts of examples/ run as they stand, on tiny models in the place of published ones."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import tiny_models
import tiny_sd
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline
from hosts import randomise
from nbclient import NotebookClient
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_encoders import tiny_clip
from torch._dynamo.utils import counters
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from coeff_diffusers import add_coeff_adapter, save_coeff_weights, unload_coeff_weights
from coeff_diffusers.layers import attention_layers

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = (
    "three_lines", "several_subjects", "with_lora", "with_controlnet", "with_ip_adapter", "from_pipe", "sdxl", "flux",
    "torch_compile", "cpu_offload", "train_from_python", "train_many_subjects", "evaluation",
)  # fmt: skip
WEIGHTS = "pytorch_coeff_weights.safetensors"


def save(pipe: Any, folder: Path, *subjects: str) -> Path:
    """The pipeline as a base model, and a folder of coefficients for each subject."""
    pipe.save_pretrained(folder / "model")
    for seed, name in enumerate(subjects):
        add_coeff_adapter(pipe, adapter_name=name)
        randomise(pipe, name, seed)
        save_coeff_weights(pipe, folder / "pets" / name, adapter_name=name)
    unload_coeff_weights(pipe)
    return folder


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Stable Diffusion, and what goes with it."""
    pipe = tiny_sd.tiny_pipeline()
    folder = save(pipe, tmp_path_factory.mktemp("sd"), "rex", "tom")
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "image.png")
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Runs a script in an empty folder, with two steps a call."""

    def run(script: str, model: Path, *flags: Any, steps: int = 2) -> None:
        name = "max_train_steps" if script == "train_from_python" else "num_inference_steps"
        given = ["--pretrained_model_name_or_path", model, f"--{name}", steps, *flags]
        monkeypatch.setattr(sys, "argv", [script, *map(str, given)])
        monkeypatch.chdir(tmp_path)
        torch.manual_seed(0)
        runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")

    return run


def pixels(*names: str) -> np.ndarray:
    return np.stack([np.asarray(Image.open(name)).astype(float) for name in names])


def assert_second_differs_alone(one: np.ndarray, other: np.ndarray) -> None:
    """Of batches from one seed, in which the second image has another subject."""
    assert (np.abs(one - other).max(axis=(1, 2, 3)) > 10).tolist() == [i == 1 for i in range(len(one))]


def test_every_script_is_here_and_in_the_list_of_its_folder() -> None:
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in EXAMPLES.glob("*.py") if f"`{path.name}`" not in listed] == []
    assert [name for name in SCRIPTS if not (EXAMPLES / f"{name}.py").exists()] == []
    assert "`first_use.ipynb`" in listed


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_stands_alone(script: str) -> None:
    text = (EXAMPLES / f"{script}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 40
    assert f"python examples/{script}.py" in text


def test_three_lines_make_an_image_by_the_file(run, sd) -> None:
    images = []
    for name in ("rex", "tom"):
        run("three_lines", sd / "model", "--coeff_weights", sd / "pets" / name)
        images.append(pixels("image.png"))
    assert np.abs(images[0] - images[1]).max() > 10  # of 255: the same seed, another file


def test_each_image_of_a_batch_has_its_own_subject(run, sd) -> None:
    batches = []
    for subjects in (("rex", "tom"), ("rex", "rex")):
        run("several_subjects", sd / "model", "--adapters", sd / "pets", "--subjects", *subjects)
        batches.append(pixels("0.png", "1.png", "2.png"))
    assert_second_differs_alone(*batches)


def test_coefficients_go_beside_a_lora(run, sd) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(sd / "model")
    images = []
    for name in ("one", "other"):
        pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), name)
        pipe.save_lora_weights(sd / name, get_peft_model_state_dict(pipe.unet, adapter_name=name))
        run("with_lora", sd / "model", "--coeff_weights", sd / "pets" / "rex", "--lora_weights", sd / name)
        images.append(pixels("image.png"))
    assert np.abs(images[0] - images[1]).max() > 10  # another LoRA beside the same coefficients
    run("with_lora", sd / "model", "--coeff_weights", sd / "pets" / "tom", "--lora_weights", sd / "other")
    assert np.abs(images[1] - pixels("image.png")).max() > 10


def test_coefficients_go_with_controlnet(run, sd) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(sd / "model")
    ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 8)).save_pretrained(sd / "control")
    images = []
    for name in ("rex", "tom"):
        flags = ("--controlnet_model_name_or_path", sd / "control", "--control_image", sd / "image.png")
        run("with_controlnet", sd / "model", *flags, "--coeff_weights", sd / "pets" / name)
        images.append(pixels("image.png"))
    assert np.abs(images[0] - images[1]).max() > 10


def ip_adapter(folder: Path, unet: Any) -> Path:
    """As the published one lies in its repository, with random weights."""
    encoder = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8,
        projection_dim=6,
    )  # fmt: skip
    CLIPVisionModelWithProjection(encoder).save_pretrained(folder / "models" / "image_encoder")
    width = unet.config.cross_attention_dim
    tensors = {
        "image_proj.proj.weight": torch.randn(4 * width, 6), "image_proj.proj.bias": torch.zeros(4 * width),
        "image_proj.norm.weight": torch.ones(width), "image_proj.norm.bias": torch.zeros(width),
    }  # fmt: skip
    crossing = [layer for path, layer in attention_layers(unet).items() if path.endswith("attn2")]
    for index, layer in enumerate(crossing):
        for name in "kv":
            tensors[f"ip_adapter.{2 * index + 1}.to_{name}_ip.weight"] = torch.randn(layer.inner_dim, width)
    save_file(tensors, folder / "models" / "ip-adapter_sd15.safetensors")
    return folder


def test_coefficients_go_with_an_ip_adapter(run, sd) -> None:
    torch.manual_seed(0)
    adapter = ip_adapter(sd / "ip", StableDiffusionPipeline.from_pretrained(sd / "model").unet)
    images = []
    for name in ("rex", "tom"):
        flags = ("--ip_adapter", adapter, "--image", sd / "image.png", "--coeff_weights", sd / "pets" / name)
        run("with_ip_adapter", sd / "model", *flags)
        images.append(pixels("image.png"))
    assert np.abs(images[0] - images[1]).max() > 10


def test_pipelines_by_from_pipe_have_the_coefficients(run, sd) -> None:
    images = []
    for name in ("rex", "tom"):
        run("from_pipe", sd / "model", "--coeff_weights", sd / "pets" / name, steps=4)
        images.append(pixels("text.png", "image.png", "inpainted.png"))
    assert (np.abs(images[0] - images[1]).max(axis=(1, 2, 3)) > 10).all()


@pytest.mark.parametrize(("script", "family"), [("sdxl", "StableDiffusionXLPipeline"), ("flux", "FluxPipeline")])
def test_two_subjects_share_a_batch_of_sdxl_and_flux(script: str, family: str, run, tmp_path) -> None:
    folder = save(tiny_models.tiny_pipeline(family), tmp_path / family, "dog", "cat")
    side = ("--side", tiny_models.SIDE) if script == "flux" else ()
    batches = []
    for second in ("cat", "dog"):
        files = ("--coeff_weights", folder / "pets" / "dog", folder / "pets" / second)
        run(script, folder / "model", *files, *side)
        batches.append(pixels("0.png", "1.png"))
    assert_second_differs_alone(*batches)


def test_another_subject_compiles_nothing_again(run, sd) -> None:
    counters.clear()
    images = []
    for second in ("tom", "rex"):
        torch.compiler.reset()
        files = ("--coeff_weights", sd / "pets" / "rex", sd / "pets" / second)
        run("torch_compile", sd / "model", *files, "--backend", "eager")
        images.append(pixels("dog.png", "cat.png"))
    assert counters["stats"]["unique_graphs"] > 0
    assert_second_differs_alone(*images)


@pytest.mark.parametrize("offload", ["model", "group"])
def test_an_offloaded_pipeline_makes_the_same_image(offload: str, run, sd) -> None:
    coeff = ("--coeff_weights", sd / "pets" / "rex")
    run("three_lines", sd / "model", *coeff, "--prompt", "a dog")
    whole = pixels("image.png")
    run("cpu_offload", sd / "model", *coeff, "--prompt", "a dog", "--offload", offload, "--device", "cpu")
    np.testing.assert_array_equal(pixels("image.png"), whole)


def test_training_from_python_calls_back_and_writes_the_file(run, sd, tmp_path, capsys) -> None:
    images, captions = [sd / "image.png"] * 2, ["a sks dog", "a sks dog, red"]
    flags = ("--images", *images, "--captions", *captions, "--output_dir", tmp_path / "out")
    run("train_from_python", sd / "model", *flags)
    assert "step 2 of 2, loss " in capsys.readouterr().out
    assert any(delta.abs().sum() > 0 for delta in load_file(tmp_path / "out" / WEIGHTS).values())


def test_many_subjects_train_in_one_run_and_share_a_batch(run, sd, tmp_path) -> None:
    subjects = []
    for name in ("rex", "tom"):
        (tmp_path / name).mkdir()
        Image.open(sd / "image.png").save(tmp_path / name / "1.png")
        subjects.append({"name": name, "images": name, "prompt": f"a sks {name}"})
    (tmp_path / "subjects.yaml").write_text(json.dumps(subjects))
    run("train_many_subjects", sd / "model", "--output_dir", tmp_path / "out", "--max_train_steps", 2)
    assert pixels("rex.png", "tom.png").shape == (2, 16, 16, 3)
    files = [load_file(tmp_path / "out" / name / WEIGHTS) for name in ("rex", "tom")]
    assert any(not files[0][key].equal(files[1][key]) for key in files[0])


def test_an_evaluation_scores_each_prompt(run, sd, tmp_path) -> None:
    (tmp_path / "reference").mkdir()
    Image.open(sd / "image.png").save(tmp_path / "reference" / "1.png")
    flags = ("--coeff_weights", sd / "pets" / "rex", "--reference", tmp_path / "reference")
    clip = ("--clip_model", tiny_clip(tmp_path / "clip"))
    run("evaluation", sd / "model", *flags, *clip, "--output_dir", tmp_path / "out", "--places", "here", "there")
    scores = json.loads((tmp_path / "out" / "images" / "scores.json").read_text())
    assert set(scores["mean"]["subject"]) == {"clip_t", "clip_i", "images"}
    assert len(list((tmp_path / "out" / "images").glob("*.png"))) == 8


@pytest.mark.slow
def test_the_notebook_runs_and_is_saved_without_outputs() -> None:
    notebook: Any = nbformat.read(EXAMPLES / "first_use.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    cells[0].source = cells[0].source.replace('"num_inference_steps": 25', '"num_inference_steps": 1')
    NotebookClient(notebook, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    shown = [output.data for cell in cells for output in cell.outputs if "data" in output]
    assert sum("image/png" in data for data in shown) == 3
