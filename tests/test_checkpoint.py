"""The file: its keys and header, whole or not at all, and what is refused with every reason listed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from hosts import HOSTS, randomise
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from coeff_diffusers import (
    CoeffAttnProcessor,
    CoeffConfig,
    add_coeff_adapter,
    checkpoint,
    coeff_parameters,
    get_active_coeff_adapters,
    list_coeff_adapters,
    load_coeff_weights,
    read_coeff_metadata,
    save_coeff_weights,
    set_coeff_adapters,
)

NAME = "pytorch_coeff_weights.safetensors"
FIRST = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.coeff"


@pytest.fixture
def trained(unet):
    add_coeff_adapter(unet, CoeffConfig(dropout=0.1))
    randomise(unet)
    return unet


@pytest.fixture
def file(trained, tmp_path):
    return save_coeff_weights(trained, tmp_path, metadata={"instance_prompt": "a sks dog"})


@pytest.fixture
def fresh():
    return HOSTS["unet"].build()


def test_keys_values_and_header(trained, file) -> None:
    tensors = load_file(file)
    layer = trained.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    torch.testing.assert_close(tensors[FIRST], layer.processor.coeff["default"].detach(), rtol=0, atol=0)
    assert len(tensors) == 8
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    assert header["format"] == "pt"
    assert header["instance_prompt"] == "a sks dog"
    description = json.loads(header["coeff_diffusers"])
    assert description["format_version"] == 1
    assert description["config"]["dropout"] == 0.1
    assert description["base"]["unet"]["class"] == "UNet2DConditionModel"
    assert description["base"]["unet"]["heads"][FIRST[5:-6]] == 2


def test_a_transformer_s_keys_have_its_prefix(tmp_path) -> None:
    flux = HOSTS["flux"].build()
    add_coeff_adapter(flux)
    assert "transformer.transformer_blocks.0.attn.coeff" in load_file(save_coeff_weights(flux, tmp_path))


def test_a_local_base_model_is_named_without_its_folder(trained, tmp_path) -> None:
    base = tmp_path / "private" / "my-model"
    trained.save_pretrained(base)
    loaded = type(trained).from_pretrained(base)
    add_coeff_adapter(loaded)
    with safe_open(save_coeff_weights(loaded, tmp_path), "pt") as opened:
        description = json.loads(opened.metadata()["coeff_diffusers"])
    assert description["base"]["unet"]["name"] == "my-model"


def test_saving_writes_exactly_one_file(file) -> None:
    assert os.listdir(file.parent) == [NAME]
    assert file.stat().st_mode & 0o444 == 0o444


def test_a_failed_write_leaves_the_older_file_and_nothing_else(trained, file, monkeypatch) -> None:
    before = file.read_bytes()

    def full_disk(path, data):
        with open(path, "wb") as torn:
            torn.write(b"torn")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match=f"as it was: No space left on device: .*{NAME}"):
        save_coeff_weights(trained, file.parent)
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [NAME]


@pytest.mark.parametrize("source", ["file", "folder", "weight_name", "subfolder", "dict"])
def test_every_local_source_gives_the_same(trained, file, fresh, source, tmp_path) -> None:
    if source == "file":
        load_coeff_weights(fresh, str(file))
    elif source == "folder":
        load_coeff_weights(fresh, file.parent)
    elif source == "weight_name":
        save_file({}, tmp_path / "other.safetensors")
        load_coeff_weights(fresh, tmp_path, weight_name=NAME)
    elif source == "subfolder":
        load_coeff_weights(fresh, tmp_path.parent, subfolder=tmp_path.name)
    else:
        load_coeff_weights(fresh, load_file(file))
    assert get_active_coeff_adapters(fresh) == {"default": 1.0}
    loaded = [parameter.detach() for parameter in coeff_parameters(fresh)]
    torch.testing.assert_close(loaded, [p.detach() for p in coeff_parameters(trained)], rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in coeff_parameters(fresh))


def test_a_dict_is_left_as_it_is(file, fresh) -> None:
    tensors = load_file(file)
    keys = list(tensors)
    load_coeff_weights(fresh, tensors)
    assert list(tensors) == keys


def test_a_repository_is_asked_for_with_the_hub_s_own_arguments(file, fresh, monkeypatch) -> None:
    asked = {}

    def download(repository, filename, **options):
        asked.update(options, repository=repository, filename=filename)
        return str(file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    load_coeff_weights(fresh, "someone/sks-dog", revision="main", subfolder="coeff", token="t")
    expected = {"repository": "someone/sks-dog", "filename": NAME}
    given = {"revision": "main", "subfolder": "coeff", "token": "t"}
    assert asked == {**expected, **given, "cache_dir": None, "local_files_only": False, "force_download": False}


def test_a_repository_that_cannot_be_had_is_named(fresh, monkeypatch) -> None:
    def download(*args, **options):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(OSError, match="'someone/sks-dog' is no file or folder here, .*offline"):
        load_coeff_weights(fresh, "someone/sks-dog")


@pytest.mark.parametrize("options", [{"weight_name": NAME}, {"subfolder": "x"}], ids=str)
def test_options_that_a_file_has_no_use_for_are_refused(file, fresh, options) -> None:
    with pytest.raises(ValueError, match=f"the file .* is the adapter itself; {next(iter(options))} can be given"):
        load_coeff_weights(fresh, file, **options)
    with pytest.raises(ValueError, match="a state dict is the adapter itself"):
        load_coeff_weights(fresh, load_file(file), **options)
    assert list_coeff_adapters(fresh) == []


def test_processors_with_their_own_softmax_are_refused_at_loading_too(file, fresh) -> None:
    fresh.set_attn_processor(AttnProcessor())
    with pytest.raises(ValueError, match="compute their own softmax"):
        load_coeff_weights(fresh, file)
    assert list_coeff_adapters(fresh) == []


def test_a_name_found_in_a_path_is_the_pipeline_s_and_the_repository_s(tmp_path) -> None:
    pipeline = tmp_path / "my-pipeline"
    (pipeline / "unet").mkdir(parents=True)
    assert checkpoint.public_name(str(pipeline / "unet")) == "unet"
    (pipeline / "model_index.json").write_text("{}")
    assert checkpoint.public_name(str(pipeline / "unet")) == "my-pipeline"
    snapshot = tmp_path / "models--someone--sks-dog" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    assert checkpoint.public_name(str(snapshot)) == "someone/sks-dog"
    assert checkpoint.public_name("someone/sks-dog") == "someone/sks-dog"


def test_several_adapters_live_side_by_side(trained, file) -> None:
    load_coeff_weights(trained, file, adapter_name="again")
    assert list_coeff_adapters(trained) == ["default", "again"]
    assert get_active_coeff_adapters(trained) == {"again": 1.0}


def test_a_file_for_another_model_lists_every_difference_and_changes_nothing(file) -> None:
    flux = HOSTS["flux"].build()
    with pytest.raises(ValueError, match="does not fit FluxTransformer2DModel, which was left as it is") as error:
        load_coeff_weights(flux, file)
    lines = str(error.value).splitlines()
    assert "  unet: the file is for a model with this component, here are ['transformer']" in lines
    assert f"  {FIRST}: there is no such attention layer" in lines
    assert len(lines) == 1 + 1 + 8
    assert list_coeff_adapters(flux) == []


def test_another_head_count_is_listed_layer_by_layer(file) -> None:
    unet = HOSTS["unet"].build()
    other = type(unet).from_config({**unet.config, "attention_head_dim": (4, 4)})
    with pytest.raises(ValueError, match="does not fit") as error:
        load_coeff_weights(other, file)
    assert f"{FIRST.removesuffix('.coeff')}: 2 heads in the file's model, 4 heads here" in str(error.value)
    assert f"{FIRST}: must have shape (4, 4) for 4 heads, got (2, 2)" in str(error.value)
    assert "mid_block" not in str(error.value)
    assert list_coeff_adapters(other) == []


def test_every_offending_tensor_is_listed_at_once(trained, file, fresh) -> None:
    tensors = load_file(file)
    second = FIRST.replace("attn1", "attn2")
    tensors[FIRST] = torch.full((2, 2), torch.nan)
    tensors[second] = torch.ones(2, 2, dtype=torch.int64)
    tensors["unet.nowhere.coeff"] = torch.ones(2, 2)
    with pytest.raises(ValueError, match="the state dict does not fit") as error:
        load_coeff_weights(fresh, tensors)
    assert f"{FIRST}: has 4 values that are not finite" in str(error.value)
    types = "(torch.float64, torch.float32, torch.float16, torch.bfloat16)"
    assert f"{second}: must be floating point {types}, got torch.int64" in str(error.value)
    assert "unet.nowhere.coeff: there is no such attention layer" in str(error.value)
    assert list_coeff_adapters(fresh) == []


def test_tied_layers_refuse_values_that_differ(file, fresh) -> None:
    alike = type(fresh).from_config({**fresh.config, "attention_head_dim": 4})
    add_coeff_adapter(alike)
    randomise(alike)
    state = checkpoint.coeff_state_dict(alike)
    tied = type(fresh).from_config({**fresh.config, "attention_head_dim": 4})
    tied.set_attn_processor(CoeffAttnProcessor(4))
    with pytest.raises(ValueError, match="attn2.coeff: differs from .*attn1.coeff, to which this layer is tied"):
        load_coeff_weights(tied, state, adapter_name="b")


def _rewrite(file, tensors=None, **header):
    with safe_open(file, "pt") as opened:
        metadata = {**opened.metadata(), **header}
    save_file(tensors or load_file(file), file, {k: v for k, v in metadata.items() if v is not None})


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (None, "is no coefficient file: its header has no 'coeff_diffusers' entry"),
        ("{", "the header's 'coeff_diffusers' entry cannot be read"),
        ("[]", "cannot be read: it must be an object, got "),
        ('{"format_version": 1}', "cannot be read: base must be an object with a component, got None"),
        (
            '{"format_version": 1, "base": {"unet": {"class": "X", "heads": 3}}}',
            "'unet'.heads must be an object, got 3",
        ),
        ('{"format_version": 99, "base": {}}', "has format version 99, this release reads 1: update"),
    ],
)
def test_a_header_that_cannot_be_read_is_refused(file, fresh, header, message) -> None:
    _rewrite(file, coeff_diffusers=header)
    with pytest.raises(ValueError, match=message):
        load_coeff_weights(fresh, file)
    assert list_coeff_adapters(fresh) == []


def test_files_that_are_not_there_or_not_safetensors(file, fresh, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file or folder .*missing.safetensors"):
        load_coeff_weights(fresh, tmp_path / "missing.safetensors")
    with pytest.raises(FileNotFoundError, match=rf"there is no x.safetensors in .*; it holds \['{NAME}'\]"):
        load_coeff_weights(fresh, tmp_path, weight_name="x.safetensors")
    (tmp_path / "weights.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"weights.bin is no .safetensors file"):
        load_coeff_weights(fresh, tmp_path / "weights.bin")
    file.write_bytes(b"not a safetensors file")
    with pytest.raises(ValueError, match="is no readable .safetensors file"):
        load_coeff_weights(fresh, file)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=rf"there is no {NAME} in .*empty; it holds \[\]"):
        load_coeff_weights(fresh, tmp_path / "empty")


def test_a_folder_of_several_files_wants_a_choice(trained, fresh, tmp_path) -> None:
    for name in ("a", "b"):
        save_coeff_weights(trained, tmp_path, weight_name=f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"choose one with weight_name: \['a.safetensors', 'b.safetensors'\]"):
        load_coeff_weights(fresh, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter_name": "x"}, r"there is no adapter 'x' to save; there are \['default'\]"),
        ({"weight_name": "x.bin"}, "weight_name must end in .safetensors, got 'x.bin'"),
        ({"metadata": {"coeff_diffusers": "x"}}, r"metadata must not set \['coeff_diffusers'\]"),
        ({"metadata": {"steps": 500}}, r"metadata must be strings, but \['steps'\] are not"),
    ],
    ids=str,
)
def test_what_cannot_be_saved_is_refused(trained, tmp_path, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        save_coeff_weights(trained, tmp_path, **options)
    assert os.listdir(tmp_path) == []


def test_values_that_are_not_finite_are_not_written_over_good_ones(trained, file) -> None:
    before = file.read_bytes()
    with torch.no_grad():
        coeff_parameters(trained)[1][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"'default' has values that are not finite, and was not written: \['unet.d"):
        save_coeff_weights(trained, file.parent)
    assert file.read_bytes() == before


def test_a_name_in_use_is_refused_before_anything_is_read(trained, fresh) -> None:
    with pytest.raises(ValueError, match="'default' is in use"):
        load_coeff_weights(trained, "/nowhere.safetensors")


def test_metadata_is_read_without_the_values_from_the_same_sources(trained, file, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **options: str(file))
    header = read_coeff_metadata(file)
    assert header == read_coeff_metadata(file.parent, weight_name=NAME) == read_coeff_metadata("someone/dog")
    assert header["instance_prompt"] == header["modelspec.trigger_phrase"] == "a sks dog"
    assert header["modelspec.architecture"] == "UNet2DConditionModel/coeff-tuning"
    assert header["modelspec.title"] == "default"
    assert header["coeff_diffusers"]["versions"]["torch"] == torch.__version__
    assert header["coeff_diffusers"]["base"]["unet"]["heads"][FIRST[5:-6]] == 2
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        read_coeff_metadata("/nowhere.safetensors")


def test_a_writer_s_own_modelspec_entries_replace_the_default_ones(trained, tmp_path) -> None:
    given = {"modelspec.title": "My dog", "modelspec.author": "me"}
    header = read_coeff_metadata(save_coeff_weights(trained, tmp_path, metadata=given))
    assert given.items() <= header.items()


def test_what_a_file_says_of_itself_has_no_part_in_what_is_computed(trained, file, fresh) -> None:
    _rewrite(file, format="x", instance_prompt="", **{"modelspec.architecture": "none", "learning_rate": "1e9"})
    load_coeff_weights(fresh, file)
    loaded = [p.detach() for p in coeff_parameters(fresh)]
    torch.testing.assert_close(loaded, [p.detach() for p in coeff_parameters(trained)], rtol=0, atol=0)


def test_not_strict_loads_what_fits_and_returns_what_did_not(trained, file, fresh) -> None:
    assert load_coeff_weights(fresh, file) == {}
    tensors = load_file(file)
    second = FIRST.replace("attn1", "attn2")
    tensors[FIRST] = torch.ones(3, 3)
    tensors["unet.nowhere.coeff"] = tensors.pop(second)
    left_out = load_coeff_weights(fresh, tensors, adapter_name="part", strict=False)
    assert left_out == {
        FIRST: "must have shape (2, 2) for 2 heads, got (3, 3)",
        "unet.nowhere.coeff": "there is no such attention layer",
    }
    assert set(checkpoint.coeff_state_dict(fresh, "part")) == set(tensors) - set(left_out)
    torch.testing.assert_close(
        checkpoint.coeff_state_dict(fresh, "part"), {k: v for k, v in tensors.items() if k not in left_out}
    )


def test_not_strict_crosses_to_another_class_with_layers_of_the_same_name(file, fresh) -> None:
    class OtherUNet(type(fresh)):
        pass

    other = OtherUNet.from_config(fresh.config)
    assert load_coeff_weights(other, file, strict=False) == {
        "unet": "the file is for a UNet2DConditionModel, this is a OtherUNet"
    }
    assert len(coeff_parameters(other)) == 8


def test_nothing_that_fits_is_an_error_also_when_not_strict(file) -> None:
    flux = HOSTS["flux"].build()
    with pytest.raises(ValueError, match="does not fit FluxTransformer2DModel"):
        load_coeff_weights(flux, file, strict=False)
    assert list_coeff_adapters(flux) == []


def test_hotswap_replaces_values_in_place_and_leaves_what_is_active(trained, file, fresh) -> None:
    add_coeff_adapter(fresh, adapter_name="other")
    add_coeff_adapter(fresh)
    set_coeff_adapters(fresh, "default", 0.5)
    before = coeff_parameters(fresh, "default")
    load_coeff_weights(fresh, file, hotswap=True)
    assert all(one is other for one, other in zip(coeff_parameters(fresh, "default"), before, strict=True))
    torch.testing.assert_close([p.detach() for p in before], [p.detach() for p in coeff_parameters(trained)])
    assert get_active_coeff_adapters(fresh) == {"default": 0.5}
    assert not any(parameter.any() for parameter in coeff_parameters(fresh, "other"))


@pytest.mark.slow
def test_hotswap_and_weights_that_stay_compile_nothing_again(trained, file, fresh) -> None:
    add_coeff_adapter(fresh)
    torch._dynamo.reset()
    compiled = torch.compile(fresh, backend="aot_eager")
    with torch.no_grad():
        before = HOSTS["unet"].run(compiled)
        load_coeff_weights(compiled, file, hotswap=True)
        with torch._dynamo.config.patch(error_on_recompile=True):
            after = HOSTS["unet"].run(compiled)
        assert (after - before).norm() > 1e-3 * before.norm()
        torch.testing.assert_close(after, HOSTS["unet"].run(fresh), rtol=1e-4, atol=1e-4)  # other sums


def test_hotswap_of_other_layers_is_refused_with_each_and_nothing_moves(trained, file, fresh) -> None:
    add_coeff_adapter(fresh, CoeffConfig(kinds=("cross",)))
    tensors = {key: value for key, value in load_file(file).items() if "up_blocks" not in key}
    with pytest.raises(ValueError, match="does not fit") as error:
        load_coeff_weights(fresh, tensors, hotswap=True)
    assert f"{FIRST}: adapter 'default' has no such layer" in str(error.value)
    assert "up_blocks.1.attentions.0.transformer_blocks.0.attn2.coeff: adapter 'default' has it" in str(error.value)
    assert not any(parameter.any() for parameter in coeff_parameters(fresh))


def test_hotswap_wants_a_name_in_use_and_the_whole_file(trained, file, fresh) -> None:
    with pytest.raises(ValueError, match=r"has no adapter \['x'\]; it has \['default'\]"):
        load_coeff_weights(trained, file, adapter_name="x", hotswap=True)
    with pytest.raises(ValueError, match="has no coefficients"):
        load_coeff_weights(fresh, file, hotswap=True)
    with pytest.raises(ValueError, match="hotswap=True replaces a whole adapter or nothing"):
        load_coeff_weights(trained, file, hotswap=True, strict=False)


@pytest.mark.skipif(sys.platform == "win32", reason="stands in for it")
def test_a_file_is_flushed_as_windows_lets_it_be(monkeypatch, trained, tmp_path) -> None:
    """Not by a handle that was opened to be read."""
    import fcntl

    flushed = []

    def flush_as_there(handle: int) -> None:
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        flushed.append(handle)

    monkeypatch.setattr(os, "fsync", flush_as_there)
    save_coeff_weights(trained, tmp_path)
    assert len(flushed) == 1
    assert (tmp_path / NAME).stat().st_size > 0
