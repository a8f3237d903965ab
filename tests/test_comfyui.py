"""The ComfyUI node: names against diffusers' conversion of original checkpoints, numbers against diffusers' layers.

ComfyUI is not installed where these tests run. What stands in for it here: a patcher of its interface, and modules
under its names that ask the attention override as its own do.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_ldm_unet_checkpoint,
)
from hosts import HOSTS, randomise, visible
from ldm_file import save_single_file
from safetensors import safe_open
from tiny_sd import tiny_pipeline
from torch import Tensor, nn

from coeff_diffusers import add_coeff_adapter, coeff_disabled, save_coeff_weights, set_coeff_adapters
from coeff_diffusers.coeff_file import read_file
from coeff_diffusers.functional import mixed_attention_reference
from coeff_diffusers.layers import attention_layers

ROOT = Path(__file__).parents[1] / "comfyui"
SD15: dict[str, Any] = {"cross_attention_dim": 768}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
}


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The package, loaded as ComfyUI loads it, with files in `models/coeff`."""
    models = tmp_path_factory.mktemp("models")
    paths: Any = ModuleType("folder_paths")
    paths.models_dir, paths.folder_names_and_paths = str(models), {}
    paths.get_filename_list = lambda name: sorted(file.name for file in (models / name).glob("*.safetensors"))
    paths.get_full_path_or_raise = lambda name, file: str(models / name / file)
    sys.modules["folder_paths"] = paths
    spec = importlib.util.spec_from_file_location("comfyui_node", ROOT / "__init__.py")
    package = importlib.util.module_from_spec(spec)
    sys.modules["comfyui_node"] = package
    spec.loader.exec_module(package)
    yield SimpleNamespace(
        package=package,
        layers=sys.modules["comfyui_node.layers"],
        apply=sys.modules["comfyui_node.apply"],
        models=models,
    )
    for name in [name for name in sys.modules if name.partition(".")[0] == "comfyui_node"] + ["folder_paths"]:
        del sys.modules[name]


# Names


def original_name(path: str, layers_per_block: int) -> str:
    """Of a layer of a UNet in the original code, by the arithmetic of its blocks."""
    if path.startswith("mid_block"):
        return path.replace("mid_block.attentions.0", "middle_block.1")
    found = re.match(r"(down|up)_blocks\.(\d)\.attentions\.(\d)\.(.*)", path)
    number = int(found[2]) * (layers_per_block + 1) + int(found[3])
    side = f"input_blocks.{1 + number}" if found[1] == "down" else f"output_blocks.{number}"
    return f"{side}.1.{found[4]}"


def other_names(levels: int, layers_per_block: int) -> set[str]:
    """Of modules without attention: of each block one, and those that say where a resolution ends."""
    a_level, blocks = layers_per_block + 1, range(levels * (layers_per_block + 1))
    ends = {number for number in blocks if number % a_level == 0 and number > 0}
    downs = {f"input_blocks.{number}.0.{'op' if number in ends else 'in_layers.0'}" for number in blocks}
    downs |= {f"middle_block.{number}.in_layers.0" for number in (0, 2)}
    ups = {f"output_blocks.{number}.0.in_layers.0" for number in blocks}
    return downs | ups | {f"output_blocks.{number - 1}.2.conv" for number in ends}


@pytest.mark.parametrize(("config", "count"), [(SD15, 32), (SDXL, 140)], ids=["SD 1.5", "SDXL"])
def test_names_of_unets_are_those_of_diffusers_own_conversion(comfyui, config: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    paths = list(attention_layers(unet))
    assert len(paths) == count
    others = other_names(len(unet.config.block_out_channels), 2)
    layers = comfyui.layers.unet_layers(sorted({original_name(path, 2) for path in paths} | others))
    assert set(layers) == set(paths)
    tags = {f"{module}.to_q.weight": torch.tensor(i) for i, module in enumerate(layers.values())}
    others |= {"time_embed.0", "time_embed.2", "input_blocks.0.0", "out.0", "out.2"}
    rest = {f"{name}.{kind}": torch.tensor(-1) for name in others for kind in ("weight", "bias")}
    checkpoint = {f"model.diffusion_model.{key}": value for key, value in (tags | rest).items()}
    converted = convert_ldm_unet_checkpoint(checkpoint, dict(unet.config))
    for i, path in enumerate(layers):
        assert converted[f"{path}.to_q.weight"] == i


def test_names_of_flux_are_those_of_diffusers_own_conversion(comfyui) -> None:
    modules = ["double_blocks.0", "double_blocks.1", "single_blocks.0", "single_blocks.1", "single_blocks.2", "img_in"]
    modules += ["double_blocks.0.img_attn", "single_blocks.0.linear1"]
    layers = comfyui.layers.flux_layers(modules)
    assert len(layers) == 5
    parts = {"double": ("img_attn.qkv", "txt_attn.qkv"), "single": ("linear1",)}
    checkpoint = {}
    for i, module in enumerate(layers.values()):
        for part in parts[module.partition("_")[0]]:
            rows = 3 * 3072 + (12288 if part == "linear1" else 0)
            for kind in ("weight", "bias"):
                checkpoint[f"{module}.{part}.{kind}"] = torch.full((rows,), float(i))
    converted = convert_flux_transformer_checkpoint_to_diffusers(_Completed(checkpoint))
    for i, path in enumerate(layers):
        assert converted[f"{path}.to_q.weight"].unique() == i


class _Completed(dict):
    """A checkpoint that has every key, most of them of no interest."""

    def pop(self, key: str, *default: Any) -> Any:
        return super().pop(key, torch.zeros(2))


# Numbers


class Patcher:
    """What the node uses of ComfyUI's `ModelPatcher`."""

    def __init__(self, diffusion: nn.Module, patches: dict[str, Any] | None = None, wrappers: Any = None) -> None:
        self.model = SimpleNamespace(diffusion_model=diffusion)
        self.object_patches, self.wrappers = dict(patches or {}), dict(wrappers or {})
        self.model_options: dict[str, Any] = {"transformer_options": {}}

    def clone(self) -> Patcher:
        return Patcher(self.model.diffusion_model, self.object_patches, self.wrappers)

    def get_model_object(self, name: str) -> Any:
        found: Any = self.model
        for part in name.split("."):
            found = getattr(found, part)
        return self.object_patches.get(name, found)

    def add_object_patch(self, name: str, patch: Any) -> None:
        self.object_patches[name] = patch

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Any) -> None:
        self.wrappers[kind, key] = [*self.wrappers.get((kind, key), []), wrapper]

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.wrappers.pop((kind, key), None)


def attention_pytorch(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Any = None, **kwargs: Any) -> Tensor:
    """The function that ComfyUI has chosen: asks the override, if there is one."""
    options = kwargs.get("transformer_options") or {}
    if "optimized_attention_override" in options:
        return options["optimized_attention_override"](
            attention_pytorch, q, k, v, heads, mask=mask, _inside_attn_wrapper=True, **kwargs
        )
    if not kwargs.get("skip_reshape"):
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


class CrossAttention(nn.Module):
    """Under the names of the original code, with the weights of a layer of diffusers."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.heads = layer.heads
        self.to_q, self.to_k, self.to_v, self.to_out = layer.to_q, layer.to_k, layer.to_v, nn.Sequential(*layer.to_out)

    def forward(self, x: Tensor, context: Any = None, transformer_options: Any = {}) -> Tensor:  # noqa: B006
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        return self.to_out(
            attention_pytorch(q, k, v, self.heads, attn_precision=None, transformer_options=transformer_options)
        )


class DoubleStreamBlock(nn.Module):
    """A block of FLUX, of its call for attention alone."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.num_heads = heads

    def forward(self, q: Tensor, k: Tensor, v: Tensor, transformer_options: Any = {}) -> Tensor:  # noqa: B006
        options = {"skip_reshape": True, "transformer_options": transformer_options}
        return attention_pytorch(q, k, v, self.num_heads, **options)


def tree(name: str, modules: dict[str, nn.Module]) -> nn.Module:
    """A model whose class has this name, with modules at these paths."""
    root: nn.Module = type(name, (nn.Module,), {})()
    for path, module in modules.items():
        *folders, last = path.split(".")
        at = root
        for folder in folders:
            if not hasattr(at, folder):
                at.add_module(folder, nn.Module())
            at = getattr(at, folder)
        at.add_module(last, module)
    return root


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = tiny_pipeline()
    for seed, name in enumerate(("dog", "cat")):
        add_coeff_adapter(pipe, adapter_name=name)
        randomise(pipe, name, seed)
    return pipe


@pytest.fixture(scope="module")
def files(comfyui, pipe) -> Path:
    for name in ("dog", "cat"):
        save_coeff_weights(pipe, comfyui.models / "coeff", weight_name=f"{name}.safetensors", adapter_name=name)
    return comfyui.models / "coeff"


@pytest.fixture
def model(pipe, tmp_path: Path) -> Patcher:
    """The pipeline's UNet in ComfyUI's layout: names by the keys of a checkpoint that diffusers reads."""
    file = save_single_file(pipe, tmp_path / "tiny.safetensors")
    with safe_open(file, "pt") as opened:
        keys = [key.removeprefix("model.diffusion_model.") for key in opened.keys()]  # noqa: SIM118
        query = {k: opened.get_tensor(f"model.diffusion_model.{k}") for k in keys if k.endswith("to_q.weight")}
    by_weight = {layer.to_q.weight.detach().numpy().tobytes(): layer for layer in attention_layers(pipe.unet).values()}
    modules: dict[str, nn.Module] = {
        key.removesuffix(".to_q.weight"): CrossAttention(by_weight[weight.numpy().tobytes()])
        for key, weight in query.items()
    }
    ends = {
        key.rpartition(".")[0] for key in keys if re.match(r"(input|output)_blocks\.\d\.\d\.(op|conv)\.weight", key)
    }
    return Patcher(tree("UNetModel", modules | {end: nn.Identity() for end in ends}))


def load(comfyui, model: Patcher, name: str, strength: float = 1.0, strict: bool = True) -> Patcher:
    node = comfyui.package.NODE_CLASS_MAPPINGS["LoadCoefficients"]()
    (patched,) = node.load(model, name, strength, strict)
    return patched


def recorded(pipe: Any) -> dict[str, tuple[Tensor, Any, Tensor]]:
    """Path -> input, text and output of each attention layer in a call of diffusers' UNet."""
    found: dict[str, tuple[Tensor, Any, Tensor]] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(layer: Any, args: Any, kwargs: Any, output: Tensor) -> None:
            found[path] = args[0], kwargs.get("encoder_hidden_states"), output

        return hook

    handles = [
        layer.register_forward_hook(keep(path), with_kwargs=True)
        for path, layer in attention_layers(pipe.unet).items()
    ]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        pipe.unet(
            torch.randn(2, 4, 8, 8, generator=generator),
            5,
            torch.randn(2, 7, 16, generator=generator),
            return_dict=False,
        )
    for handle in handles:
        handle.remove()
    return found


def outputs(comfyui, model: Patcher, calls: dict[str, Any]) -> dict[str, Tensor]:
    """Of each layer of ComfyUI's model, from the inputs that diffusers' had."""
    diffusion = model.model.diffusion_model
    layers = comfyui.layers.unet_layers(name for name, _ in diffusion.named_modules())
    with torch.no_grad():
        return {
            path: model.get_model_object(f"diffusion_model.{layers[path]}.forward")(x, context=text)
            for path, (x, text, _) in calls.items()
        }


def test_every_layer_computes_what_it_does_in_diffusers(comfyui, pipe, files, model) -> None:
    pipe.unet.eval()
    set_coeff_adapters(pipe, "dog", 0.7)
    calls = recorded(pipe)
    assert len(calls) == 14
    patched = load(comfyui, model, "dog.safetensors", 0.7)
    expected = {path: output for path, (_, _, output) in calls.items()}
    torch.testing.assert_close(outputs(comfyui, patched, calls), expected)
    with pytest.raises(AssertionError):  # the model that was given has none
        torch.testing.assert_close(outputs(comfyui, model, calls), expected)


def test_several_files_add_up_and_strength_0_is_the_base_model(comfyui, pipe, files, model) -> None:
    set_coeff_adapters(pipe, ["dog", "cat"], [0.5, -0.25])
    calls = recorded(pipe)
    both = load(comfyui, load(comfyui, model, "dog.safetensors", 0.5), "cat.safetensors", -0.25)
    expected = {path: output for path, (_, _, output) in calls.items()}
    torch.testing.assert_close(outputs(comfyui, both, calls), expected)
    with coeff_disabled(pipe):
        base = recorded(pipe)
    none = load(comfyui, model, "dog.safetensors", 0.0)
    assert none is not model
    assert not none.object_patches
    torch.testing.assert_close(outputs(comfyui, none, base), {path: output for path, (_, _, output) in base.items()})


def test_flux_blocks_mix_their_call_for_attention(comfyui, tmp_path) -> None:
    torch.manual_seed(0)
    transformer = visible(HOSTS["flux"].build().eval())
    add_coeff_adapter(transformer)
    randomise(transformer)
    tensors, header = read_file(save_coeff_weights(transformer, tmp_path))
    heads = transformer.config.num_attention_heads
    names = ("double_blocks.0", "single_blocks.0", "single_blocks.1")
    model = Patcher(tree("Flux", {name: DoubleStreamBlock(heads) for name in names}))
    patched = comfyui.apply.apply_coefficients(model, tensors, header, 1.0)
    q, k, v = torch.randn(3, 2, heads, 5, 4)
    paths = ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn", "single_transformer_blocks.1.attn")
    for name, path in zip(names, paths):
        out = patched.get_model_object(f"diffusion_model.{name}.forward")(q, k, v)
        expected = mixed_attention_reference(q, k, v, tensors[f"transformer.{path}.coeff"])
        torch.testing.assert_close(out, expected.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("shape", [(5, 7), (2, 5, 7), (2, 3, 5, 7)])
def test_masks_and_the_scale_count(comfyui, shape: tuple[int, ...]) -> None:
    mixing = sys.modules["comfyui_node.mixing"]
    q, k, v, delta = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4), torch.randn(3, 3)
    mask = torch.randn(shape)
    forward = mixing.MixedForward(lambda: None, ((delta, 1.0),))
    out = forward.attention(None, q, k, v, 3, mask, skip_reshape=True, skip_output_reshape=True, scale=0.3)
    full = mask if mask.ndim == 4 else mask.expand(2, 5, 7)[:, None]
    torch.testing.assert_close(out, mixed_attention_reference(q, k, v, delta, full, scale=0.3))


# What does not fit


def test_every_mismatch_is_listed(comfyui, pipe, files, model) -> None:
    tensors, header = read_file(files / "dog.safetensors")
    first, second, *_ = tensors
    tensors[first] = torch.zeros(3, 3)
    tensors["unet.nowhere.attn1.coeff"] = tensors[second]
    tensors["text_encoder.layers.0.coeff"] = tensors[second]
    header["coeff_diffusers"]["base"]["unet"]["heads"]["up_blocks.9.attn1"] = 2
    with pytest.raises(ValueError, match="the coefficients do not fit ComfyUI's UNetModel:") as error:
        comfyui.apply.apply_coefficients(model, tensors, header, 1.0)
    assert str(error.value).splitlines()[1:] == [
        "  unet.up_blocks.9.attn1: 2 heads in the file's model, no here",
        f"  {first}: must have shape (2, 2) for 2 heads, got (3, 3)",
        "  unet.nowhere.attn1.coeff: there is no such attention layer",
        "  text_encoder.layers.0.coeff: is of another component than unet, which is all that this node changes",
    ]
    patched = comfyui.apply.apply_coefficients(model, tensors, header, 1.0, strict=False)
    assert len(patched.object_patches) == 13


def test_files_of_other_models_and_other_models_are_refused(comfyui, files, model) -> None:
    flux = Patcher(tree("Flux", {"double_blocks.0": DoubleStreamBlock(2)}))
    with pytest.raises(ValueError, match=r"file: it is for \['unet'\], and this model is a transformer"):
        load(comfyui, flux, "dog.safetensors")
    with pytest.raises(ValueError, match="model: is a HunyuanVideo; coefficients can be had on UNetModel, Flux"):
        load(comfyui, Patcher(tree("HunyuanVideo", {})), "dog.safetensors", strict=False)


def test_layers_that_other_nodes_compute_are_refused(comfyui, files, model) -> None:
    model.model_options["transformer_options"]["patches_replace"] = {"attn2": {("input", 1): object()}}
    with pytest.raises(ValueError, match="another node computes input_blocks.1.1.transformer_blocks.0.attn2"):
        load(comfyui, model, "dog.safetensors")
    model.model_options["transformer_options"]["patches_replace"] = {"attn1": {("middle", 0, 0): object()}}
    with pytest.raises(ValueError, match="another node computes middle_block.1.transformer_blocks.0.attn1"):
        load(comfyui, model, "dog.safetensors")


def test_a_call_without_the_coefficients_is_an_error(comfyui, files, model) -> None:
    ((check,),) = load(comfyui, model, "dog.safetensors").wrappers.values()
    with pytest.raises(RuntimeError, match="the coefficients of 14 of 14 layers had no effect, the first is"):
        check(lambda: None)


# The workflow


def test_the_workflow_is_sound_and_has_the_nodes_values(comfyui, files) -> None:
    (file,) = (ROOT / "workflows").glob("*.json")
    workflow = json.loads(file.read_text())
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for number, source, output, target, slot, kind in workflow["links"]:
        assert number in nodes[source]["outputs"][output]["links"]
        assert nodes[target]["inputs"][slot]["link"] == number
        assert nodes[target]["inputs"][slot]["type"] == nodes[source]["outputs"][output]["type"] == kind
    (ours,) = (node for node in nodes.values() if node["type"] == "LoadCoefficients")
    inputs = comfyui.package.NODE_CLASS_MAPPINGS["LoadCoefficients"].INPUT_TYPES()["required"]
    assert inputs["coeff_name"][0] == ["cat.safetensors", "dog.safetensors"]
    assert len(ours["widgets_values"]) == len(inputs) - 1
    assert ours["inputs"][0]["name"] == next(iter(inputs))
