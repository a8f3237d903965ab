"""Sums of adapters in files, what is left of pruned ones, and what their headers say."""

from __future__ import annotations

import pytest
import torch
from hosts import HOSTS, randomise
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from coeff_diffusers import (
    CoeffConfig,
    add_coeff_adapter,
    coeff_parameters,
    load_coeff_weights,
    merge_coeff_files,
    prune_coeff_file,
    read_coeff_metadata,
    save_coeff_weights,
    set_coeff_adapters,
)
from coeff_diffusers.arithmetic import combine, prune_entries, prune_layers, relative_norm
from coeff_diffusers.layers import attention_layers


@pytest.fixture
def files(unet, tmp_path):
    """Two subjects, the second without self-attention."""
    paths = []
    for seed, (name, kinds) in enumerate({"dog": ("self", "cross"), "cat": ("cross",)}.items()):
        add_coeff_adapter(unet, CoeffConfig(kinds=kinds), adapter_name=name)
        randomise(unet, name, seed)
        metadata = {"instance_prompt": f"a sks {name}", "steps": "5"}
        paths.append(
            save_coeff_weights(unet, tmp_path, weight_name=f"{name}.safetensors", adapter_name=name, metadata=metadata)
        )
    return paths


@torch.no_grad()
def run(model):
    return HOSTS["unet"].run(model)


def test_a_merged_file_is_the_weighted_adapters_together(unet, files, tmp_path) -> None:
    set_coeff_adapters(unet, ["dog", "cat"], [0.7, -1.2])
    expected = run(unet)
    merged = merge_coeff_files(files, tmp_path / "both.safetensors", [0.7, -1.2])
    load_coeff_weights(unet, merged, adapter_name="both")
    torch.testing.assert_close(run(unet), expected, rtol=1e-4, atol=1e-4)  # the sum is rounded to float32 once more


def test_sums_are_exact_and_a_missing_layer_counts_as_zeros() -> None:
    one = {"a.coeff": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b.coeff": torch.ones(1, 1)}
    other = {"a.coeff": torch.tensor([[0.0, 2.0], [5.0, -4.0]], dtype=torch.float64)}
    assert combine([one, other], [1, -1])["a.coeff"].tolist() == [[1.0, 0.0], [-2.0, 8.0]]
    average = combine([one, other], [0.5, 0.5])
    assert average["a.coeff"].tolist() == [[0.5, 2.0], [4.0, 0.0]]
    assert average["b.coeff"].item() == 0.5
    assert average["a.coeff"].dtype == torch.float32
    assert combine([one], [3])["b.coeff"].item() == 3
    assert one["a.coeff"].tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_a_header_says_how_the_file_was_made(files, tmp_path) -> None:
    merged = merge_coeff_files(files, tmp_path / "both.safetensors", [1, 0.25])
    pruned = prune_coeff_file(merged, tmp_path / "small.safetensors", entries=3)
    header = read_coeff_metadata(pruned)
    made = header["coeff_diffusers"]["made_from"]
    assert (made["operation"], made["keep"]) == ("prune", {"entries": 3})
    (source,) = made["sources"]
    assert source["file"] == "both.safetensors"
    weights = {source["file"]: source["weight"] for source in source["made_from"]["sources"]}
    assert weights == {"dog.safetensors": 1.0, "cat.safetensors": 0.25}
    prompts = [source["metadata"]["instance_prompt"] for source in source["made_from"]["sources"]]
    assert prompts == ["a sks dog", "a sks cat"]
    assert header["steps"] == "5"  # on which both agree
    assert "instance_prompt" not in header
    assert "modelspec.trigger_phrase" not in header
    assert header["modelspec.title"] == "small"
    assert header["coeff_diffusers"]["config"] is None  # they were trained otherwise
    assert str(tmp_path) not in str(header)


def test_the_largest_entries_are_kept_over_all_layers() -> None:
    state = {"a": torch.tensor([[1.0, -9.0], [0.5, 2.0]]), "b": torch.tensor([[0.1]]), "c": torch.tensor([[-3.0]])}
    pruned = prune_entries(state, 3)
    assert {key: delta.tolist() for key, delta in pruned.items()} == {"a": [[0, -9.0], [0, 2.0]], "c": [[-3.0]]}
    assert prune_entries(state, 6).keys() == state.keys()


def test_layers_are_ranked_by_what_they_add_relative_to_the_identity() -> None:
    wide, narrow = torch.full((4, 4), 0.3), torch.full((1, 1), 1.0)  # norms 1.2 and 1, of the identity 2 and 1
    assert [relative_norm(wide), relative_norm(narrow)] == pytest.approx([0.6, 1.0])
    assert list(prune_layers({"wide": wide, "narrow": narrow}, 1)) == ["narrow"]


def test_pruned_layers_take_the_untouched_call(unet, files, tmp_path) -> None:
    fresh = HOSTS["unet"].build()
    before = {path: layer.processor for path, layer in attention_layers(fresh).items()}
    load_coeff_weights(fresh, prune_coeff_file(files[0], tmp_path / "p.safetensors", layers=3))
    untouched = [path for path, layer in attention_layers(fresh).items() if layer.processor is before[path]]
    assert len(untouched) == len(before) - 3
    assert len(coeff_parameters(fresh)) == 3


def test_files_of_other_models_are_refused_with_every_difference(files, unet, tmp_path) -> None:
    other = type(unet).from_config({**unet.config, "attention_head_dim": (4, 4)})
    other.register_to_config(_name_or_path="someone/other")
    add_coeff_adapter(other)
    third = save_coeff_weights(other, tmp_path, weight_name="other.safetensors")
    flux = HOSTS["flux"].build()
    add_coeff_adapter(flux)
    fourth = save_coeff_weights(flux, tmp_path, weight_name="flux.safetensors")
    with pytest.raises(ValueError, match="the files are for different models") as error:
        merge_coeff_files([*files, third, fourth], tmp_path / "out.safetensors")
    lines = str(error.value).splitlines()
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1 heads"
    assert f"  {layer}: 2 in dog.safetensors, 4 in other.safetensors" in lines
    assert "  unet name:  in dog.safetensors, someone/other in other.safetensors" in lines
    assert "  unet class: UNet2DConditionModel in dog.safetensors, absent in flux.safetensors" in lines
    assert not any("cat" in line for line in lines)
    assert not (tmp_path / "out.safetensors").exists()


def test_models_that_differ_in_name_alone_can_be_merged_on_demand(files, unet, tmp_path) -> None:
    unet.register_to_config(_name_or_path="someone/other")
    third = save_coeff_weights(unet, tmp_path, weight_name="other.safetensors", adapter_name="dog")
    with pytest.raises(ValueError, match="unet name"):
        merge_coeff_files([files[0], third], tmp_path / "out.safetensors")
    merge_coeff_files([files[0], third], tmp_path / "out.safetensors", ignore_base_name=True)
    doubled = {key: 2 * delta for key, delta in load_file(files[0]).items()}
    torch.testing.assert_close(load_file(tmp_path / "out.safetensors"), doubled, rtol=0, atol=0)


def test_a_damaged_file_is_refused_with_every_offender(files, tmp_path) -> None:
    tensors = load_file(files[1])
    first, second = sorted(tensors)[:2]
    tensors[first] = torch.full_like(tensors[first], torch.inf)
    tensors[second] = torch.ones(5, 5)
    tensors["unet.nowhere.coeff"] = torch.ones(2, 2)
    with safe_open(files[1], "pt") as opened:
        header = opened.metadata()
    save_file(tensors, files[1], header)
    with pytest.raises(ValueError, match="cat.safetensors is damaged") as error:
        merge_coeff_files(files, tmp_path / "out.safetensors")
    assert f"{first}: has 4 values that are not finite" in str(error.value)
    assert f"{second}: must have shape (4, 4), got (5, 5)" in str(error.value)
    assert "unet.nowhere.coeff: no layer of the model" in str(error.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda files, out: merge_coeff_files(files, out, [1]), "2 adapters need as many finite weights.*got"),
        (lambda files, out: merge_coeff_files(files, out, [1, float("nan")]), "finite weights"),
        (lambda files, out: merge_coeff_files([], out), "0 adapters need"),
        (lambda files, out: merge_coeff_files(files, "out.bin"), "output must end in .safetensors, got 'out.bin'"),
        (lambda files, out: prune_coeff_file(files[0], out), "one of entries and layers must be given"),
        (lambda files, out: prune_coeff_file(files[0], out, entries=1, layers=1), "one of entries and layers"),
        (lambda files, out: prune_coeff_file(files[0], out, layers=9), r"keep must lie in \[1, 8\].* 8 layers, got 9"),
        (lambda files, out: prune_coeff_file(files[0], out, entries=0), r"keep must lie in .*entries, got 0"),
        (lambda files, out: combine([{"a": torch.ones(1, 1)}, {"a": torch.ones(2, 2)}], [1, 1]), "a: has the shapes"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_is_written(files, tmp_path, call, message) -> None:
    out = tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match=message):
        call(files, out)
    assert not out.exists()


def test_a_file_of_nothing_is_not_written(unet, tmp_path) -> None:
    add_coeff_adapter(unet)
    zeros = save_coeff_weights(unet, tmp_path)
    with pytest.raises(ValueError, match="nothing is left to write to .*: every entry is 0"):
        prune_coeff_file(zeros, tmp_path / "out.safetensors", entries=3)
