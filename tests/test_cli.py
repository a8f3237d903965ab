"""The command line: what it prints, writes and answers to a script."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hosts import HOSTS, randomise
from PIL import Image
from safetensors.torch import load_file

import coeff_diffusers
from coeff_diffusers import add_coeff_adapter, save_coeff_weights
from coeff_diffusers.cli import main, make_parser
from coeff_diffusers.plot import caption

FIRST = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"


@pytest.fixture
def dog(unet, tmp_path):
    add_coeff_adapter(unet)
    randomise(unet)
    return str(save_coeff_weights(unet, tmp_path, weight_name="dog.safetensors", metadata={"steps": "5"}))


@pytest.fixture
def cat(unet, dog, tmp_path):
    randomise(unet, seed=1)
    return str(save_coeff_weights(unet, tmp_path, weight_name="cat.safetensors"))


@pytest.fixture
def answer(capsys):
    """Runs a command: exit code, and what it printed (parsed, with --json)."""

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        text = printed.err if code == 2 else printed.out
        return code, json.loads(text) if "--json" in arguments and code < 2 else text

    return run


def test_a_console_that_lacks_a_letter_shows_its_number(dog, tmp_path, monkeypatch) -> None:
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", console)
    assert main(["info", str(Path(dog).rename(tmp_path / "狐.safetensors"))]) == 0
    assert b"\\u72d0.safetensors: 56 coefficients" in console.buffer.getvalue()
    assert console.errors == "strict"  # as it was


def test_info_tells_what_is_in_a_file(answer, dog) -> None:
    code, said = answer("info", dog, "--json", "--top", 2)
    tensors = load_file(dog)
    assert code == 0
    assert said["coefficients"] == 56
    assert said["header"]["coeff_diffusers"]["base"]["unet"]["class"] == "UNet2DConditionModel"
    first = said["layers"][0]
    assert first["layer"] == FIRST
    assert first["norm"] == pytest.approx(float(tensors[f"{FIRST}.coeff"].norm()))
    assert first["relative_norm"] == pytest.approx(first["norm"] / 2**0.5)
    assert len(said["heads"]) == 2
    head = said["heads"][0]
    row = tensors[f"{head['layer']}.coeff"][head["head"]]
    assert head["norm"] == pytest.approx(max(float(d.norm(dim=1).max()) for d in tensors.values()))
    assert head["entry"] == pytest.approx(float(row[head["source"]]))
    assert abs(head["entry"]) == pytest.approx(float(row.abs().max()))
    code, text = answer("info", dog)
    assert "56 coefficients" in text
    assert "steps: 5" in text
    assert FIRST in text


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ([], (1, 1)),
        (["--weights", "1", "-1"], (1, -1)),
        (["--average"], (0.5, 0.5)),
        (["--interpolate", "0.3"], (0.7, 0.3)),
    ],
    ids=str,
)
def test_merge_adds_up(answer, dog, cat, tmp_path, options, weights) -> None:
    out = tmp_path / "out.safetensors"
    code, said = answer("merge", dog, cat, "-o", out, "--json", *options)
    assert (code, said["weights"]) == (0, pytest.approx(list(weights)))
    one, other = load_file(dog), load_file(cat)
    expected = {key: weights[0] * one[key] + weights[1] * other[key] for key in one}
    torch.testing.assert_close(load_file(out), expected)


def test_prune_says_how_much_is_left(answer, dog, tmp_path) -> None:
    out = tmp_path / "out.safetensors"
    code, said = answer("prune", dog, "-o", out, "--layers", 3, "--json")
    before, after = (torch.cat([d.flatten() for d in load_file(file).values()]) for file in (dog, out))
    assert (code, said["layers"]) == (0, [8, 3])
    assert said["squared_norm_kept"] == pytest.approx(float(after.square().sum() / before.square().sum()))
    code, text = answer("prune", dog, "-o", out, "--entries", 10)
    assert "10 of 56 entries" in text


def test_diff_answers_by_its_exit_code(answer, dog, cat, tmp_path) -> None:
    code, text = answer("diff", dog, dog)
    assert (code, text) == (0, "equal: 8 layers\n")
    code, said = answer("diff", dog, cat, "--json")
    assert (code, said["equal"], len(said["layers"])) == (1, False, 8)
    largest = float((load_file(dog)[f"{FIRST}.coeff"] - load_file(cat)[f"{FIRST}.coeff"]).abs().max())
    assert next(layer for layer in said["layers"] if layer["layer"] == FIRST)["largest"] == pytest.approx(largest)
    assert answer("diff", dog, cat, "--tolerance", 100)[0] == 0
    small = tmp_path / "small.safetensors"
    answer("prune", dog, "-o", small, "--layers", 7)
    code, text = answer("diff", small, dog)
    assert code == 1
    assert f"only in {dog}" in text


def test_diff_names_the_base_models_that_differ(answer, dog, tmp_path) -> None:
    flux = HOSTS["flux"].build()
    add_coeff_adapter(flux)
    other = save_coeff_weights(flux, tmp_path, weight_name="flux.safetensors")
    code, text = answer("diff", dog, other)
    assert code == 1
    assert f"unet class: UNet2DConditionModel in {dog}, absent in {other}" in text


def test_check_reads_a_model_s_config_and_no_weight(answer, unet, dog, tmp_path) -> None:
    (tmp_path / "model").mkdir()
    unet.save_config(tmp_path / "model")
    code, text = answer("check", dog, "--model", tmp_path / "model")
    assert code == 0, text
    other = type(unet).from_config({**unet.config, "attention_head_dim": (4, 4)})
    other.save_config(tmp_path / "model")
    code, said = answer("check", dog, "--model", tmp_path / "model", "--json")
    assert (code, said["fits"]) == (1, False)
    assert said["differences"][FIRST] == "2 heads in the file's model, 4 heads here"


def test_check_finds_the_denoisers_of_a_pipeline(answer, unet, dog, tmp_path) -> None:
    unet.save_config(tmp_path / "pipe" / "unet")
    index = {"_class_name": "X", "unet": ["diffusers", "UNet2DConditionModel"], "transformer": [None, None]}
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps(index))
    assert answer("check", dog, "--model", tmp_path / "pipe")[0] == 0
    index["unet"][1] = "MyUNet"
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps(index))
    code, text = answer("check", dog, "--model", tmp_path / "pipe")
    assert code == 2
    assert "MyUNet is no model class of diffusers" in text


def test_plots_are_written(answer, dog, cat, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    for command in (["info", dog], ["diff", dog, cat]):
        _code, text = answer(*command, "--plot", tmp_path / "delta.png")
        assert f"wrote {tmp_path / 'delta.png'}" in text
        with Image.open(tmp_path / "delta.png") as image:
            assert image.width > 500
            assert len(image.convert("RGB").getcolors(2**20)) > 50
        (tmp_path / "delta.png").unlink()


def test_growth_is_drawn_from_a_runs_checkpoints(answer, dog, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    for step in (20, 100):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        shutil.copy(dog, folder / "pytorch_coeff_weights.safetensors")
    shutil.copy(dog, tmp_path / "run" / "pytorch_coeff_weights.safetensors")
    code, result = answer("info", tmp_path / "run", "--growth", tmp_path / "growth.png", "--json")
    assert code == 0
    assert result["steps"] == [20, 100]
    with Image.open(tmp_path / "growth.png") as image:
        assert image.width > 500
    shutil.rmtree(tmp_path / "run" / "checkpoint-100")
    code, text = answer("info", tmp_path / "run", "--growth", tmp_path / "growth.png")
    assert code == 2
    assert "has 1 checkpoints with a pytorch_coeff_weights.safetensors, and growth takes two" in text


def test_without_matplotlib_a_plot_is_refused_with_the_way_out(answer, dog, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, text = answer("info", dog, "--plot", tmp_path / "delta.png")
    assert code == 2
    assert "pip install 'coeff_diffusers[plot]'" in text
    assert not (tmp_path / "delta.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "/nowhere.safetensors"], "info: there is no file or folder /nowhere.safetensors"),
        (["check", "DOG", "--model", "/nowhere"], "check: "),
        (["merge", "DOG", "-o", "OUT", "--interpolate", "0.5"], "--interpolate goes from one file to another, got 1"),
        (["merge", "DOG", "-o", "OUT", "--weights", "1", "2"], "1 adapters need as many finite weights"),
        (["prune", "DOG", "-o", "OUT", "--entries", "100"], r"keep must lie in [1, 56]"),
    ],
    ids=str,
)
def test_what_cannot_be_done_ends_with_two_and_a_line(answer, dog, tmp_path, arguments, message) -> None:
    out = tmp_path / "out.safetensors"
    code, text = answer(*({"DOG": dog, "OUT": out}.get(argument, argument) for argument in arguments))
    assert code == 2
    assert message in text
    assert not out.exists()


def test_wrong_usage_ends_with_two(dog, capsys) -> None:
    for arguments in ([], ["prune", dog, "-o", "x"], ["nonsense"]):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code == 2


def test_every_command_shows_examples(capsys) -> None:
    for command in ("info", "merge", "prune", "diff", "check"):
        with pytest.raises(SystemExit):
            make_parser().parse_args([command, "--help"])
        assert f"coeff-diffusers {command} " in capsys.readouterr().out.split("examples:")[1]


def test_captions_are_two_short_lines() -> None:
    assert caption(f"{FIRST}.coeff") == "down_blocks.0.attentions.0\ntransformer_blocks.0.attn1"
    assert caption("transformer.single_transformer_blocks.37.attn.coeff") == "single_transformer_blocks.37\nattn"


def test_layers_are_listed_by_number(answer, tmp_path) -> None:
    from diffusers import FluxTransformer2DModel

    flux = FluxTransformer2DModel.from_config({**HOSTS["flux"].build().config, "num_single_layers": 11})
    add_coeff_adapter(flux)
    _code, said = answer("info", save_coeff_weights(flux, tmp_path), "--json")
    numbers = [int(layer["layer"].split(".")[2]) for layer in said["layers"] if "single" in layer["layer"]]
    assert numbers == list(range(11))


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_is_no_error(dog) -> None:
    command = f"{sys.executable} -m coeff_diffusers.cli info {dog} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_and_version_load_no_torch() -> None:
    code = "import sys; from coeff_diffusers.cli import main\nfor flags in {flags}:\n  try: main(flags)\n"
    code += "  except SystemExit: pass\nprint([name for name in ('torch', 'diffusers') if name in sys.modules])"
    flags = [
        ["--help"],
        ["--version"],
        ["info", "--help"],
        ["train", "--help"],
        ["generate", "--help"],
        ["score", "-h"],
        ["serve", "--help"],
        ["app", "--help"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", code.replace("{flags}", repr(flags))], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    for told in (
        f"coeff-diffusers {coeff_diffusers.__version__}",
        "--learning_rate RATE",
        "--coeff_weights",
        "--clip_model",
        "--max_batch_size",
        "--max_train_images",
    ):
        assert told in done.stdout


@pytest.mark.parametrize("command", ["train", "generate", "score", "serve", "app"])
def test_a_command_that_runs_a_model_is_in_the_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert f"    {command} " in capsys.readouterr().out


@pytest.mark.parametrize(("command", "package"), [("app", "gradio"), ("serve", "ray")])
def test_a_command_names_the_package_that_it_lacks(
    command: str, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith(("coeff_diffusers.app", "coeff_diffusers.serving"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert main([command, "--pretrained_model_name_or_path", "model", "--adapters", "folder"]) == 1
    expected = f"error: {command} needs {package}; pip install 'coeff_diffusers[{command}]'"
    assert capsys.readouterr().err.strip() == expected


def test_a_misspelled_flag_of_a_command_is_answered(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["merge", "a", "b", "-o", "c", "--avrage"])
    assert "did you mean --average?" in capsys.readouterr().err
