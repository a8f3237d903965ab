"""The coefficient file: one `.safetensors` an adapter.

Keys are `<component>.<module path>.coeff`, values Delta, (H, H) float32. The header's `coeff_diffusers` entry is JSON:
`format_version`, `config`, and for each component of the base model its class, its name and the head count of every
attention layer. It serves to refuse files of another model; nothing that is computed comes from it.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .adapters import (
    DEFAULT_ADAPTER,
    check_new_adapter_name,
    coeff_processors,
    components,
    list_coeff_adapters,
    set_coeff_adapters,
    wrap_layers,
)
from .config import CoeffConfig
from .layers import attention_layers, check_softmax, head_count, reason_left_out
from .processor import CoeffAttnProcessor
from .text import check_text_encoder, is_text_encoder

COEFF_WEIGHT_NAME = "pytorch_coeff_weights.safetensors"
FORMAT_VERSION = 1
_SUFFIX = ".coeff"


def save_coeff_weights(
    model: Any,
    save_directory: str | os.PathLike[str],
    *,
    weight_name: str = COEFF_WEIGHT_NAME,
    adapter_name: str = DEFAULT_ADAPTER,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes one adapter to `save_directory / weight_name`, whole or not at all.

    Args:
        model: a diffusers model or a pipeline.
        save_directory: made if it does not exist.
        weight_name: file name, ending in `.safetensors`.
        adapter_name: which adapter to write, active or not.
        metadata: further entries of the file's header, strings to strings.

    Returns:
        The path of the file.

    Raises:
        ValueError: if there is no such adapter, a value is not finite, or the file name or a metadata key cannot be
            used.
    """
    if adapter_name not in list_coeff_adapters(model):
        raise ValueError(f"there is no adapter {adapter_name!r} to save; there are {list_coeff_adapters(model)}")
    if not weight_name.endswith(".safetensors"):
        raise ValueError(f"weight_name must end in .safetensors, got {weight_name!r}")
    header = {"format": "pt", "coeff_diffusers": json.dumps(_description(model, adapter_name))}
    taken = sorted(set(header) & set(metadata or ()))
    if taken:
        raise ValueError(f"metadata must not set {taken}, which the file format uses")
    header.update(metadata or {})
    tensors = coeff_state_dict(model, adapter_name)
    broken = [key for key, delta in tensors.items() if not torch.isfinite(delta).all()]
    if broken:
        raise ValueError(f"adapter {adapter_name!r} has values that are not finite, and was not written: {broken}")
    path = Path(save_directory) / weight_name
    _save_whole(tensors, header, path)
    return path


def load_coeff_weights(
    model: Any,
    pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    weight_name: str | None = None,
    adapter_name: str = DEFAULT_ADAPTER,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> None:
    """Loads an adapter and makes it the active one, with weight 1.

    All or nothing: every key, shape, value and fact about the base model that does not fit is listed in one error,
    and the model is as it was.

    Args:
        model: a diffusers model or a pipeline.
        pretrained_model_name_or_path_or_dict: a file, a folder, a repository of the Hugging Face Hub, or a state dict
            with the keys of the file format.
        weight_name: the file in the folder or repository. By default `pytorch_coeff_weights.safetensors`, or the only
            `.safetensors` file of a folder.
        adapter_name: the name to load it under, not in use yet.
        subfolder: of the folder or repository.
        revision, token, cache_dir, local_files_only, force_download: of a repository, as
            `huggingface_hub.hf_hub_download` takes them.

    What the file says of its training (dropout among it) is not applied: a loaded adapter has the default
    [`CoeffConfig`].

    Raises:
        ValueError: if the content does not fit the model, its attention processors compute their own softmax, the
            name is in use, or `weight_name` or `subfolder` is given beside a file or a state dict.
        OSError: if there is no such file.
    """
    check_new_adapter_name(model, adapter_name)
    source = pretrained_model_name_or_path_or_dict
    description: dict[str, Any] | None
    if isinstance(source, Mapping):
        _check_not_given("a state dict", weight_name=weight_name, subfolder=subfolder)
        state_dict, description = dict(source), None
        origin = "the state dict"
    else:
        path = _find_file(
            source,
            weight_name,
            subfolder,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        state_dict, description = _read(path)
        origin = str(path)
    layers = _keyed_layers(model)
    problems = _base_mismatches(model, description) + _tensor_mismatches(state_dict, layers)
    if problems:
        raise ValueError(
            f"{origin} does not fit {type(model).__name__}, which was left as it is:\n  " + "\n  ".join(problems)
        )
    chosen = {key: layers[key] for key in state_dict}
    check_softmax(chosen)
    for component, part in components(model).items():
        if is_text_encoder(part) and any(key.startswith(f"{component}.") for key in chosen):
            check_text_encoder(part)
    wrap_layers(model, list(chosen.values()), adapter_name, CoeffConfig())
    with torch.no_grad():
        for key, layer in chosen.items():
            layer.processor.coeff[adapter_name].copy_(state_dict[key])
    set_coeff_adapters(model, adapter_name)


def coeff_state_dict(model: Any, adapter_name: str = DEFAULT_ADAPTER) -> dict[str, Tensor]:
    """The adapter with the file's keys: copies on the CPU, float32, (H, H)."""
    return {
        key: layer.processor.coeff[adapter_name].detach().cpu().clone()
        for key, layer in _keyed_layers(model).items()
        if adapter_name in getattr(getattr(layer, "processor", None), "coeff", ())
    }


def _keyed_layers(model: Any) -> dict[str, Any]:
    """Key of the file format -> attention module."""
    return {
        f"{component}.{path}{_SUFFIX}": layer
        for component, part in components(model).items()
        for path, layer in attention_layers(part).items()
    }


def _description(model: Any, adapter_name: str) -> dict[str, Any]:
    saved = {key.partition(".")[0] for key in coeff_state_dict(model, adapter_name)}
    base = {
        component: {
            "class": type(part).__name__,
            "name": _base_name(model, part),
            "heads": {path: head_count(layer) for path, layer in attention_layers(part).items()},
        }
        for component, part in components(model).items()
        if component in saved
    }
    config = next(p.configs[adapter_name] for p in coeff_processors(model) if adapter_name in p.configs)
    return {"format_version": FORMAT_VERSION, "config": config.to_dict(), "base": base}


def _base_name(model: Any, part: Any) -> str:
    config = getattr(part, "config", {})  # a mapping in diffusers, an object in transformers
    own = config.get("_name_or_path") if isinstance(config, Mapping) else getattr(config, "_name_or_path", None)
    return public_name(getattr(model, "name_or_path", None) or own or "")


def public_name(name_or_path: str) -> str:
    """A name on the Hub as it is, and found again in the path of its cache; of other folders the last part only.

    Files are passed on, and say nothing of their writer's disk. A component's folder is named as its pipeline's.
    """
    path = Path(name_or_path)
    if not name_or_path or not path.exists():
        return name_or_path
    path = path.resolve()
    if (path.parent / "model_index.json").exists():
        path = path.parent
    if path.parent.name == "snapshots" and path.parents[1].name.startswith("models--"):
        return path.parents[1].name.removeprefix("models--").replace("--", "/")
    return path.name


def _save_whole(tensors: dict[str, Tensor], header: dict[str, str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata=header)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _find_file(source: str | os.PathLike[str], weight_name: str | None, subfolder: str | None, **hub: Any) -> Path:
    path = Path(source)
    if path.is_dir():
        return _find_in_folder(path / (subfolder or ""), weight_name)
    if path.is_file():
        _check_not_given(f"the file {path}", weight_name=weight_name, subfolder=subfolder)
    if path.suffix and path.suffix != ".safetensors" and path.is_file():
        raise ValueError(f"{path} is no .safetensors file; coefficients are read from nothing else")
    if path.is_file():
        return path
    if path.suffix == ".safetensors" or path.is_absolute():
        raise FileNotFoundError(f"there is no file or folder {path}")
    return _download(str(source), weight_name or COEFF_WEIGHT_NAME, subfolder=subfolder, **hub)


def _check_not_given(what: str, **options: str | None) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"{what} is the adapter itself; {' and '.join(given)} can be given of a folder or repository")


def _find_in_folder(folder: Path, weight_name: str | None) -> Path:
    found = sorted(file.name for file in folder.glob("*.safetensors"))
    name = weight_name or (COEFF_WEIGHT_NAME if COEFF_WEIGHT_NAME in found else None)
    if name is None and len(found) == 1:
        name = found[0]
    if name is None and found:
        raise ValueError(f"{folder} holds several files, choose one with weight_name: {found}")
    if name not in found:
        raise FileNotFoundError(f"there is no {name or COEFF_WEIGHT_NAME} in {folder}; it holds {found}")
    return folder / str(name)


def _download(repository: str, filename: str, **hub: Any) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(repository, filename, **hub))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise OSError(
            f"{repository!r} is no file or folder here, and {filename!r} could not be had from a repository of that "
            f"name: {error}"
        ) from error


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is no readable .safetensors file: {error}") from error
    if "coeff_diffusers" not in header:
        raise ValueError(f"{path} is no coefficient file: its header has no 'coeff_diffusers' entry")
    try:
        description = json.loads(header["coeff_diffusers"])
        version = description["format_version"]
        if version == FORMAT_VERSION:
            all(isinstance(base["class"], str) and base["heads"].keys() for base in description["base"].values())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: the header's 'coeff_diffusers' entry cannot be read: {error!r}") from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}, this release reads {FORMAT_VERSION}: update the package"
        )
    return tensors, description


def _base_mismatches(model: Any, description: dict[str, Any] | None) -> list[str]:
    """What the file says of its base model and is otherwise here, a line each."""
    problems = []
    parts = components(model)
    for component, base in (description or {}).get("base", {}).items():
        if component not in parts:
            problems.append(f"{component}: the file is for a model with this component, here are {sorted(parts)}")
            continue
        part, here = parts[component], {path: head_count(m) for path, m in attention_layers(parts[component]).items()}
        if base["class"] != type(part).__name__:
            problems.append(f"{component}: the file is for a {base['class']}, this is a {type(part).__name__}")
        for path in sorted(base["heads"].keys() | here.keys()):
            there_heads, here_heads = base["heads"].get(path), here.get(path)
            if there_heads != here_heads:
                problems.append(
                    f"{component}.{path}: {_heads(there_heads)} in the file's model, {_heads(here_heads)} here"
                )
    return problems


def _heads(count: int | None) -> str:
    return "no such attention layer" if count is None else f"{count} heads"


def _tensor_mismatches(state_dict: Mapping[str, Tensor], layers: Mapping[str, Any]) -> list[str]:
    problems = [] if state_dict else ["it holds no coefficients"]
    tied: dict[int, str] = {}
    for key, delta in sorted(state_dict.items()):
        if key not in layers:
            problems.append(f"{key}: there is no such attention layer")
            continue
        if reason_left_out(layers[key]):
            problems.append(f"{key}: is {reason_left_out(layers[key])}")
        heads = head_count(layers[key])
        if delta.shape != (heads, heads):
            problems.append(f"{key}: must have shape {(heads, heads)} for {heads} heads, got {tuple(delta.shape)}")
        elif not delta.is_floating_point():
            problems.append(f"{key}: must be floating point, got {delta.dtype}")
        elif not torch.isfinite(delta).all():
            problems.append(f"{key}: has {int((~torch.isfinite(delta)).sum())} values that are not finite")
        elif isinstance(getattr(layers[key], "processor", None), CoeffAttnProcessor):
            first = tied.setdefault(id(layers[key].processor), key)
            if not torch.equal(delta, state_dict[first]):
                problems.append(f"{key}: differs from {first}, to which this layer is tied")
    return problems
