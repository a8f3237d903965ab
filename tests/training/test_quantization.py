"""Quantised base models: trained on, saved, loaded into the quantised and into the plain base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from ldm_file import save_single_file
from safetensors.torch import load_file
from tiny_models import SIDE, call_settings, tiny_pipeline
from tiny_sd import tiny_pipeline as tiny_sd

from coeff_diffusers import (
    coeff_disabled,
    load_coeff_weights,
    merge_coeff_files,
    read_coeff_metadata,
    unload_coeff_weights,
)
from coeff_diffusers import quantization as module
from coeff_diffusers.cli import main as command
from coeff_diffusers.commands.flags import parse_generate
from coeff_diffusers.commands.generate import base_pipeline, load_pipeline
from coeff_diffusers.commands.requests import PromptsError
from coeff_diffusers.quantization import METHODS, Quantization, quantization_of
from coeff_diffusers.serving.pipeline import SubjectPipeline
from coeff_diffusers.serving.run import checked_names
from coeff_diffusers.serving.settings import parse_serve
from coeff_diffusers.training.errors import InputError
from coeff_diffusers.training.run import offload
from coeff_diffusers.training.run.dreambooth import TrainingResult

# How far images are from those of the plain base: weights of 4 bits are off by some 10 %, of float8 by 6 % at most (3
# bits of mantissa), of int8 by less than 1 % of the largest.
FAR = {"bnb_nf4": 0.5, "torchao_float8": 0.1, "quanto_float8": 0.1}
FLUX = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux") / "tiny-flux"
    tiny_pipeline("FluxPipeline").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(flux: Path) -> Any:
    """The pipeline as it is, with no coefficients between tests."""
    return load(flux)


@pytest.fixture
def train_flux(train: Callable[..., TrainingResult], flux: Path) -> Callable[..., TrainingResult]:
    def run(**changes: Any) -> TrainingResult:
        settings = {"pretrained_model_name_or_path": flux, "max_train_steps": 2, "train_batch_size": 1}
        return train(**settings | {"resolution": SIDE} | changes)

    return run


@pytest.mark.parametrize("method", ["bnb_nf4", "torchao_int8"])
def test_on_a_cpu_the_file_does_not_stay_in_memory(flux: Path, method: str) -> None:
    quantization = Quantization(method)
    with quantization.loading():
        config = quantization.config("diffusers", torch.float32)
        loaded: Any = FluxTransformer2DModel.from_pretrained(flux / "transformer", quantization_config=config)
    plain = [p for p in loaded.parameters() if type(p) is torch.nn.Parameter and type(p.data) is torch.Tensor]
    assert plain
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in plain)


def load(path: Path, **how: Any) -> Any:
    pipe = base_pipeline(str(path), None, "float32", Quantization(**how), "cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(pipe: Any) -> np.ndarray:
    settings = call_settings(type(pipe).__name__)
    made: np.ndarray = pipe(prompt="a sks fox", generator=torch.Generator().manual_seed(0), **settings).images[0]
    return made


def said_of(file: Path | None) -> Any:
    assert file is not None
    [base] = read_coeff_metadata(file)["coeff_diffusers"]["base"].values()
    return base.get("quantization")


@pytest.mark.parametrize("method", METHODS)
def test_trains_on_a_quantised_base_and_loads_into_it_and_into_the_plain_one(
    method: str, train_flux: Callable[..., TrainingResult], flux: Path, plain: Any
) -> None:
    file = train_flux(quantize=method).coeff_file
    assert said_of(file) == method
    trained = load_file(file)
    assert all(delta.count_nonzero() == delta.numel() for delta in trained.values())  # gradients passed through
    images, quantised = {}, load(flux, method=method)
    for name, pipe in (("plain", plain), ("quantised", quantised)):
        before = image(pipe)
        load_coeff_weights(pipe, file)
        images[name] = image(pipe)
        assert not np.array_equal(images[name], before)
        with coeff_disabled(pipe):
            np.testing.assert_array_equal(image(pipe), before)
    unload_coeff_weights(plain)
    assert quantization_of(quantised.transformer) == quantization_of(quantised.text_encoder_2) == method
    assert quantization_of(quantised.text_encoder) is None  # CLIP is small
    assert not np.array_equal(images["plain"], images["quantised"])
    assert np.abs(images["plain"] - images["quantised"]).max() < FAR.get(method, 0.03)


def test_a_quantised_unet_trains_in_16_bits(train: Callable[..., TrainingResult]) -> None:
    """Norms of 16 bits on a CPU take no more than that from the layers before them; torchao: tests of --memory."""
    train(quantize="bnb_nf4", mixed_precision="bf16", max_train_steps=1)


def test_a_base_that_was_saved_quantised_trains_as_it_is(
    train_flux: Callable[..., TrainingResult],
    flux: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    load(flux, method="bnb_nf4").save_pretrained(tmp_path / "nf4")
    expected = load_file(train_flux(quantize="bnb_nf4", output_dir=tmp_path / "a").coeff_file)
    whole = capsys.readouterr().out.partition("all params: ")[2].partition(" ")[0]
    file = train_flux(pretrained_model_name_or_path=tmp_path / "nf4", output_dir=tmp_path / "b").coeff_file
    assert said_of(file) == "bnb_nf4"
    torch.testing.assert_close(load_file(file), expected, rtol=0, atol=0)
    assert int(whole.replace(",", "")) == sum(
        p.numel()
        for part in tiny_pipeline("FluxPipeline").components.values()
        if isinstance(part, torch.nn.Module)
        for p in part.parameters()
    ) + sum(delta.numel() for delta in expected.values())  # two weights in a byte are two
    with pytest.raises(InputError, match="it loads as it is: leave --quantize torchao_int8 out"):
        train_flux(pretrained_model_name_or_path=tmp_path / "nf4", quantize="torchao_int8", output_dir=tmp_path / "c")


def test_a_single_file_is_quantised_as_its_folder_is(
    train: Callable[..., TrainingResult], base: Path, tmp_path: Path
) -> None:
    """By diffusers' `from_single_file`, which by itself would quantise nothing, or fail."""
    single = save_single_file(tiny_sd(), tmp_path / "fox.safetensors")
    expected = load_file(train(quantize="torchao_int8", output_dir=tmp_path / "a").coeff_file)
    result = train(
        pretrained_model_name_or_path=single,
        single_file_config=base,
        quantize="torchao_int8",
        output_dir=tmp_path / "b",
    )
    assert said_of(result.coeff_file) == "torchao_int8"
    torch.testing.assert_close(load_file(result.coeff_file), expected, rtol=0, atol=0)


def write_gguf(path: Path) -> Path:
    """The tiny Flux, of those weights whose rows are of 32 numbers, which are a block of Q8_0, in 8 bits."""
    writer = gguf.GGUFWriter(path, "flux")
    for name, weight in tiny_pipeline("FluxPipeline").transformer.state_dict().items():
        values = weight.numpy()
        if values.ndim == 2 and values.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_denoiser_in_a_gguf_file(
    train_flux: Callable[..., TrainingResult], flux: Path, plain: Any, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "flux.gguf")
    file = train_flux(gguf_file=path, quantize="torchao_int8").coeff_file
    assert said_of(file) == "gguf"
    pipe = load(flux, gguf_file=str(path), method="torchao_int8")
    assert (quantization_of(pipe.transformer), quantization_of(pipe.text_encoder_2)) == ("gguf", "torchao_int8")
    for each in (pipe, plain):
        load_coeff_weights(each, file)
    assert 0 < np.abs(image(pipe) - image(plain)).max() < 0.03
    unload_coeff_weights(plain)
    (tmp_path / "none.gguf").write_bytes(b"nothing")
    with pytest.raises(InputError, match="^--gguf_file: .*none.gguf is no FluxTransformer2DModel of "):
        train_flux(gguf_file=tmp_path / "none.gguf", output_dir=tmp_path / "b")


def test_the_header_tells_what_the_files_that_were_merged_have_in_common(
    train: Callable[..., TrainingResult], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = train(max_train_steps=1, output_dir=tmp_path / "a").coeff_file
    file = train(max_train_steps=1, output_dir=tmp_path / "b", quantize="torchao_int8").coeff_file
    assert plain is not None
    assert file is not None
    capsys.readouterr()
    command(["info", str(file)])
    assert "UNet2DConditionModel" in (line := capsys.readouterr().out.splitlines()[3])
    assert line.endswith("layers, quantised: torchao_int8")
    assert said_of(merge_coeff_files([file, plain], tmp_path / "both.safetensors")) is None
    assert said_of(merge_coeff_files([file, file], tmp_path / "twice.safetensors")) == "torchao_int8"


@pytest.mark.parametrize("method", ["bnb_nf4", "torchao_int8", "quanto_int8", "gguf"])
def test_group_offload_is_the_same_run(
    method: str, train_flux: Callable[..., TrainingResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {"gguf_file": write_gguf(tmp_path / "flux.gguf")} if method == "gguf" else {"quantize": method}
    expected = load_file(train_flux(**how).coeff_file)
    brought = []
    monkeypatch.setattr(offload, "_copy", lambda parameter, device: brought.append(parameter) or parameter.to(device))
    file = train_flux(**how, group_offload=True, output_dir=tmp_path / "offloaded").coeff_file
    torch.testing.assert_close(load_file(file), expected, rtol=0, atol=0)
    assert {type(parameter) for parameter in brought} > {torch.nn.Parameter}  # biases, and what is quantised


def test_weights_of_bnb_int8_cannot_be_offloaded(flux: Path, train: Callable[..., TrainingResult]) -> None:
    with pytest.raises(ValueError, match="bitsandbytes holds weights of 8 bits beside the layers' own"):
        offload.GroupOffload(load(flux, method="bnb_int8").transformer, torch.device("cpu"))
    with pytest.raises(InputError, match="--group_offload cannot move the weights of --quantize bnb_int8"):
        train(quantize="bnb_int8", group_offload=True)


@pytest.mark.parametrize("method", ["bnb_int8", "quanto_int8"])
def test_weights_that_diffusers_does_not_move_cannot_be_offloaded_in_generation(method: str, base: Path) -> None:
    with pytest.raises(ValueError, match=f"--group_offload: diffusers does not move weights of {method}; take"):
        base_pipeline(str(base), None, "float32", Quantization(method), "cpu", group_offload=True)


def test_generate_and_serve_take_the_flags(
    train: Callable[..., TrainingResult], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = train(max_train_steps=1).coeff_file
    assert file is not None
    model = ["--pretrained_model_name_or_path", str(base), "--quantize", "torchao_int8"]
    args = parse_generate([*model, "--coeff_weights", str(file), "--prompt", "a fox"])
    assert quantization_of(load_pipeline(args, {"default": file}, "cpu").unet) == "torchao_int8"
    settings = parse_serve([*model, "--adapters", str(file.parent)])
    assert quantization_of(SubjectPipeline(settings).pipe.unet) == "torchao_int8"
    monkeypatch.setattr(module, "_is_there", lambda name: False)
    with pytest.raises(PromptsError, match="--quantize: torchao_int8 needs torchao: pip install torchao"):
        load_pipeline(args, {"default": file}, "cpu")
    with pytest.raises(InputError, match="--quantize: torchao_int8 needs torchao: pip install torchao"):
        checked_names(settings)


# What cannot be had


def test_a_package_that_is_not_there_is_named_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, argv: Callable[..., list[str]], train: Callable[..., TrainingResult]
) -> None:
    monkeypatch.setattr(module, "_is_there", lambda name: False)
    with pytest.raises(InputError, match="--quantize: quanto_int8 needs optimum-quanto: pip install optimum-quanto"):
        train(quantize="quanto_int8")
    with pytest.raises(InputError, match="--gguf_file: gguf needs gguf: pip install gguf"):
        train(gguf_file="some.gguf")


def test_a_device_that_cannot_is_told_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="bnb_int8 needs one of cuda, xpu, cpu, and this runs on mps: take"):
        Quantization("bnb_int8").check("mps", FLUX)
    monkeypatch.setattr("bitsandbytes.supported_torch_devices", {"cuda"})
    with pytest.raises(
        ValueError, match="bnb_nf4: this release of bitsandbytes needs a GPU, and this runs on the CPU"
    ):
        Quantization("bnb_nf4").check("cpu", FLUX)
    Quantization("bnb_nf4").check("cuda", FLUX)


def test_nothing_to_quantise_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "some.gguf").touch()
    with pytest.raises(ValueError, match="bnb_nf4 has nothing to quantise: the denoiser is in the GGUF file"):
        Quantization("bnb_nf4", str(tmp_path / "some.gguf")).check("cpu", FLUX)
    with pytest.raises(ValueError, match="bnb_nf4 finds no denoiser in a WonderPipeline"):
        Quantization("bnb_nf4").check("cpu", {"_class_name": "WonderPipeline"})
    with pytest.raises(ValueError, match="there is no GGUF file none.gguf"):
        Quantization(None, "none.gguf").check("cpu", FLUX)


NO_FSDP = "--quantize: shards of --fsdp are of plain weights; leave one of them out"
NO_DORA = "--use_dora: peft cannot read the magnitudes of weights under {}; take --quantize bnb_nf4, or a LoRA without"
DORA: dict[str, Any] = {"lora_rank": 2, "use_dora": True}


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({"quantize": "bnb_nf4", "fsdp": True}, NO_FSDP),
        ({"quantize": "bnb_int8", **DORA}, NO_DORA.format("--quantize bnb_int8")),
        ({"gguf_file": "a.gguf", **DORA}, NO_DORA.format("--gguf_file")),
    ],
)
def test_what_does_not_go_together(flags: dict[str, Any], problem: str, train: Callable[..., TrainingResult]) -> None:
    with pytest.raises(InputError, match=problem):
        train(**flags)


def test_a_lora_beside_the_coefficients_trains_too(train_flux: Callable[..., TrainingResult]) -> None:
    """Of the ways that peft has a layer of its own for, by the one that takes least."""
    result = train_flux(quantize="bnb_nf4", lora_rank=2, use_dora=True, lora_learning_rate=0.1)
    assert result.lora_file is not None
    weights = load_file(result.lora_file)
    second = [weight for name, weight in weights.items() if "lora_B" in name]
    assert second
    assert all(weight.count_nonzero() for weight in second)
