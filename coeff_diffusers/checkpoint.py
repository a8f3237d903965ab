"""The coefficient file: one `.safetensors` an adapter.

Keys are `<component>.<module path>.coeff`, values Delta, (H, H) float32. The header's `coeff_diffusers` entry is JSON:
`format_version`, `config`, `versions` of the libraries that wrote it, and for each component of the base model its
class, its name, the head count of every attention layer, and `quantization` if its weights were quantised. It serves
to refuse files of another model; nothing that is computed comes from it. `modelspec.*` entries (Stability AI's
specification of model metadata) are for other tools.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save
from torch import Tensor

from .adapters import (
    DEFAULT_ADAPTER,
    check_new_adapter_name,
    components,
    is_wrapped,
    known_attention_layers,
    known_coefficients,
    known_heads,
    layer_coefficients,
    list_coeff_adapters,
    put_adapter,
    replace_values,
)
from .coeff_file import FORMAT_VERSION, MAX_HEADER_BYTES, all_usable, read_file, too_large, value_problem
from .config import CoeffConfig
from .files import check_file_name, check_subfolder, check_text, printable, whole_file
from .layers import attention_layers, check_softmax, head_count, reason_left_out
from .processor import CoeffAttnProcessor
from .quantization import quantization_of
from .resolved import CHANGES
from .text import check_text_encoder, is_text_encoder

COEFF_WEIGHT_NAME = "pytorch_coeff_weights.safetensors"
KEY_SUFFIX = ".coeff"


def save_coeff_weights(
    model: Any,
    save_directory: str | os.PathLike[str],
    *,
    weight_name: str = COEFF_WEIGHT_NAME,
    adapter_name: str = DEFAULT_ADAPTER,
    metadata: Mapping[str, str] | None = None,
    allow_large_values: bool = False,
) -> Path:
    """Writes one adapter to `save_directory / weight_name`, whole or not at all.

    Args:
        model: a diffusers model or a pipeline.
        save_directory: made if it does not exist.
        weight_name: file name, ending in `.safetensors`.
        adapter_name: which adapter to write, active or not.
        metadata: further entries of the file's header, strings to strings. `instance_prompt` is also written as
            `modelspec.trigger_phrase`; entries named `modelspec.*` replace those that are written by default.
        allow_large_values: also writes values beyond 10,000, which loading refuses unless it is told the same.

    Returns:
        The path of the file.

    Raises:
        ValueError: if there is no such adapter, a value is not finite or too large, or the file name or the metadata
            cannot be used.
        OSError: if the file cannot be written; one that was there is as it was.
    """
    if adapter_name not in list_coeff_adapters(model):
        raise ValueError(f"there is no adapter {adapter_name!r} to save; there are {list_coeff_adapters(model)}")
    check_file_name(weight_name, "weight_name")
    if not weight_name.endswith(".safetensors"):
        raise ValueError(f"weight_name must end in .safetensors, got {weight_name!r}")
    header = file_header(_description(model, adapter_name), title=adapter_name, metadata=metadata or {})
    tensors = coeff_state_dict(model, adapter_name)
    broken = [key for key, delta in tensors.items() if not torch.isfinite(delta).all()]
    if broken:
        raise ValueError(f"adapter {adapter_name!r} has values that are not finite, and was not written: {broken}")
    large = {key: reason for key, delta in tensors.items() if (reason := too_large(delta))}
    if large and not allow_large_values:
        key, reason = next(iter(large.items()))
        raise ValueError(
            f"adapter {adapter_name!r} was not written, for loading refuses the values of {len(large)} of its layers "
            f"(allow_large_values=True writes, and loads, them): {key} {reason}"
        )
    path = Path(save_directory) / weight_name
    save_whole(tensors, header, path)
    return path


def load_coeff_weights(
    model: Any,
    pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    weight_name: str | None = None,
    adapter_name: str = DEFAULT_ADAPTER,
    strict: bool = True,
    hotswap: bool = False,
    allow_large_values: bool = False,
    activate: bool = True,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> dict[str, str]:
    """Loads an adapter and makes it the active one, with weight 1.

    It takes its bytes and no more, until `coeff_parameters` is asked for what of it trains.

    All or nothing: every key, shape, value and fact about the base model that does not fit is listed in one error,
    and the model is as it was.

    Args:
        model: a diffusers model or a pipeline.
        pretrained_model_name_or_path_or_dict: a file, a folder, a repository of the Hugging Face Hub, or a state dict
            with the keys of the file format.
        weight_name: the file in the folder or repository. By default `pytorch_coeff_weights.safetensors`, or the only
            `.safetensors` file of a folder.
        adapter_name: the name to load it under, not in use yet.
        strict: `False` loads the layers that fit, and returns what did not.
        hotswap: replaces the values of `adapter_name`, which must exist and have exactly the file's layers. Nothing is
            compiled again, what is active stays so, and calls that run in other threads end with the old values. If
            `coeff_parameters` was asked for the adapter, its parameters stay the same objects.
        allow_large_values: takes values beyond 10,000, too, which no training gives, and with which images are noise.
        activate: `False` leaves active what is.
        subfolder: of the folder or repository.
        revision: of a repository: a branch, a tag or a commit. This and the following are those of
            `huggingface_hub.hf_hub_download`.
        token: for a private repository; the one of `hf auth login` if not given.
        cache_dir: where downloads are kept.
        local_files_only: takes what was downloaded before, and asks nobody.
        force_download: downloads again what is there.

    What the file says of its training (dropout among it) is not applied: a loaded adapter has the default
    [`CoeffConfig`].

    Returns:
        What did not fit: key of the file or part of the model -> why. Empty, unless `strict=False`.

    Raises:
        ValueError: if the content does not fit the model (with `strict=False`: no layer of it does), its attention
            processors compute their own softmax, the name is in use (with `hotswap`: is not), or `weight_name` or
            `subfolder` is given beside a file or a state dict.
        OSError: if there is no such file.
    """
    if hotswap and not strict:
        raise ValueError("hotswap=True replaces a whole adapter or nothing; strict=False cannot be had with it")
    source = pretrained_model_name_or_path_or_dict
    if not isinstance(source, Mapping) and not os.path.lexists(source):  # before it is downloaded
        _check_name(model, adapter_name, hotswap, activate)
    description: dict[str, Any] | None
    if isinstance(source, Mapping):
        _check_not_given("a state dict", weight_name=weight_name, subfolder=subfolder)
        state_dict, description = dict(source), None
        origin = "the state dict"
        if not_text := [key for key in state_dict if not isinstance(key, str)]:
            raise ValueError(f"the keys of a state dict must be strings, as 'unet....attn1.coeff', got {not_text}")
    else:
        hub = {"revision": revision, "token": token, "cache_dir": cache_dir}
        hub |= {"local_files_only": local_files_only, "force_download": force_download}
        path = find_file(source, weight_name, subfolder, **hub)
        state_dict, header = read_file(path)
        description, origin = header["coeff_diffusers"], printable(path)
    with CHANGES:  # the checks are still true when the adapter is put in place
        _check_name(model, adapter_name, hotswap, activate)
        return _put(
            model, state_dict, description, origin, adapter_name, strict, hotswap, allow_large_values, activate
        )


def _check_name(model: Any, adapter_name: str, hotswap: bool, activate: bool) -> None:
    if hotswap:
        known_coefficients(model, [adapter_name])
    else:
        check_new_adapter_name(model, adapter_name, activate)


def _put(
    model: Any,
    state_dict: dict[str, Tensor],
    description: dict[str, Any] | None,
    origin: str,
    adapter_name: str,
    strict: bool,
    hotswap: bool,
    allow_large_values: bool,
    activate: bool,
) -> dict[str, str]:
    layers = _keyed_layers(model)
    problems = differences(model, state_dict, description, allow_large_values, layers)
    if hotswap:
        problems |= _other_layers(model, adapter_name, state_dict)
    chosen = {key: layers[key] for key in state_dict if key not in problems}
    if problems and (strict or not chosen):
        raise ValueError(
            f"{origin} does not fit {type(model).__name__}, which was left as it is:\n  "
            + "\n  ".join(f"{printable(what)}: {why}" for what, why in problems.items())
        )
    check_softmax({key: layer for key, layer in chosen.items() if not is_wrapped(layer)})
    for component, part in components(model).items():
        if is_text_encoder(part) and any(key.startswith(f"{component}.") for key in chosen):
            check_text_encoder(part)
    paths = {key.removesuffix(KEY_SUFFIX): layer for key, layer in chosen.items()}
    values = {path: state_dict[f"{path}{KEY_SUFFIX}"] for path in paths}
    if hotswap:
        replace_values(model, adapter_name, values)
    else:
        put_adapter(model, paths, adapter_name, CoeffConfig(), values, activate)
    return problems


def read_coeff_metadata(
    pretrained_model_name_or_path: str | os.PathLike[str],
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> dict[str, Any]:
    """The header of a coefficient file, without its values. Sources and arguments as [`load_coeff_weights`].

    Returns:
        The header's entries, strings, but for `coeff_diffusers`, which is read from its JSON: `format_version`,
        `config`, `versions`, and `base`, which says for each component of the base model its `class`, `name` and
        `heads`. It is what the file's writer says of it, and may be wrong.

    Raises:
        ValueError: if it is no coefficient file, or written by a newer release.
        OSError: if there is no such file.
    """
    hub = {"revision": revision, "token": token, "cache_dir": cache_dir}
    hub |= {"local_files_only": local_files_only, "force_download": force_download}
    return read_file(find_file(pretrained_model_name_or_path, weight_name, subfolder, **hub), values=False)[1]


def coeff_state_dict(model: Any, adapter_name: str = DEFAULT_ADAPTER) -> dict[str, Tensor]:
    """The adapter with the file's keys: copies on the CPU, float32, (H, H).

    [`load_coeff_weights`] takes it, also for a model that the host has built of this one:

        pipe = AnimateDiffPipeline.from_pipe(tuned, motion_adapter=adapter)
        load_coeff_weights(pipe, coeff_state_dict(tuned))
    """
    return {
        key: values.clone()
        for key, layer in _keyed_layers(model).items()
        if (values := _values_of(layer, adapter_name)) is not None
    }


def _values_of(layer: Any, adapter_name: str) -> Tensor | None:
    processor = getattr(layer, "processor", None)
    if not isinstance(processor, CoeffAttnProcessor) or not processor.coefficients.has(adapter_name):
        return None
    coefficients = processor.coefficients
    return coefficients.record.state.adapters[adapter_name].delta(coefficients.number).detach().cpu()


def _keyed_layers(model: Any) -> dict[str, Any]:
    """Key of the file format -> attention module."""
    return {
        f"{component}.{path}{KEY_SUFFIX}": layer
        for component, part in components(model).items()
        for path, layer in known_attention_layers(part).items()
    }


def _description(model: Any, adapter_name: str) -> dict[str, Any]:
    saved = {key.partition(".")[0] for key in coeff_state_dict(model, adapter_name)}
    base = {
        component: {
            "class": type(part).__name__,
            "name": _base_name(model, part),
            "heads": {path: head_count(layer) for path, layer in attention_layers(part).items()},
            **({"quantization": how} if (how := quantization_of(part)) else {}),
        }
        for component, part in components(model).items()
        if component in saved
    }
    parts = sorted(components(model).values(), key=is_text_encoder)  # the denoiser's config, where there are several
    layers = (layer for part in parts for layer in layer_coefficients(part))
    config = next(layer.configs[adapter_name] for layer in layers if adapter_name in layer.configs)
    return {"format_version": FORMAT_VERSION, "config": config.to_dict(), "base": base}


def file_header(description: Mapping[str, Any], *, title: str, metadata: Mapping[str, str]) -> dict[str, str]:
    """The header of a file: the format's own entries, `modelspec.*`, and `metadata`.

    Raises:
        ValueError: if `metadata` sets an entry of the format itself, or holds something other than strings.
    """
    from . import __version__

    taken = sorted({"format", "coeff_diffusers"} & set(metadata))
    if taken:
        raise ValueError(f"metadata must not set {taken}, which the file format uses")
    not_text = [key for key, value in metadata.items() if not (isinstance(key, str) and isinstance(value, str))]
    if not_text:
        raise ValueError(f"metadata must be strings, but {not_text} are not: a file's header holds nothing else")
    for key, value in metadata.items():
        check_text(key + value, f"metadata {key!r}")
    versions = {"coeff_diffusers": __version__, "diffusers": diffusers.__version__, "torch": torch.__version__}
    classes = sorted({base["class"] for base in description["base"].values()})
    spec = {
        "sai_model_spec": "1.0.0",
        "architecture": f"{'+'.join(classes)}/coeff-tuning",
        "implementation": "coeff_diffusers",
        "title": title,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if "instance_prompt" in metadata:
        spec["trigger_phrase"] = metadata["instance_prompt"]
    return {
        "format": "pt",
        "coeff_diffusers": json.dumps({**description, "versions": versions}),
        **{f"modelspec.{name}": value for name, value in spec.items()},
        **metadata,
    }


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
    return printable(path.name)


def save_whole(tensors: dict[str, Tensor], header: dict[str, str], path: Path) -> None:
    """Writes a coefficient file, whole or not at all."""
    size, most = len(json.dumps(header, ensure_ascii=False).encode()), MAX_HEADER_BYTES // 2  # the rest is for keys
    if size > most:
        longest = max(header, key=lambda name: len(header[name]))
        raise ValueError(
            f"{printable(path)} was not written: its metadata would have {size:,} bytes, and at most {most:,} are "
            f"read; the longest entry is {longest!r}"
        )
    data = save(tensors, header)
    with whole_file(path) as temporary:
        Path(temporary).write_bytes(data)


def find_file(
    source: str | os.PathLike[str], weight_name: str | None = None, subfolder: str | None = None, **hub: Any
) -> Path:
    """The path of a coefficient file that is given as a file, a folder or a repository of the Hub."""
    path = Path(source)
    if weight_name is not None:
        check_file_name(weight_name, "weight_name")
    if subfolder is not None:
        check_subfolder(subfolder)
    if path.is_dir():
        return _find_in_folder(path / (subfolder or ""), weight_name)
    if os.path.lexists(path):
        _check_not_given(f"the file {printable(path)}", weight_name=weight_name, subfolder=subfolder)
        if path.suffix not in ("", ".safetensors"):
            raise ValueError(f"{printable(path)} is no .safetensors file; coefficients are read from nothing else")
        return path
    if path.suffix == ".safetensors" or path.is_absolute():
        raise FileNotFoundError(f"there is no file or folder {printable(path)}")
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
        raise ValueError(f"{printable(folder)} holds several files, choose one with weight_name: {found}")
    if name not in found:
        raise FileNotFoundError(f"there is no {name or COEFF_WEIGHT_NAME} in {printable(folder)}; it holds {found}")
    return folder / str(name)


def _download(repository: str, filename: str, **hub: Any) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(repository, filename, **hub))
    except (HfHubHTTPError, HFValidationError, UnicodeError, OSError) as error:
        raise OSError(
            f"{repository!r} is no file or folder here, and {filename!r} could not be had from a repository of that "
            f"name: {error}"
        ) from error


def differences(
    model: Any,
    state_dict: Mapping[str, Tensor],
    description: Mapping[str, Any] | None,
    allow_large_values: bool = False,
    layers: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """What does not fit `model`: key of the file, or part of the model -> why. Empty if everything does.

    `layers` are its layers by key, where they are known.
    """
    layers = _keyed_layers(model) if layers is None else layers
    return _base_differences(model, description) | _tensor_differences(state_dict, layers, allow_large_values)


def _base_differences(model: Any, description: Mapping[str, Any] | None) -> dict[str, str]:
    """What the file says of its base model and is otherwise here."""
    found = {}
    parts = components(model)
    for component, base in (description or {}).get("base", {}).items():
        if component not in parts:
            found[component] = f"the file is for a model with this component, here are {sorted(parts)}"
            continue
        part = parts[component]
        here = known_heads(part)
        if base["class"] != type(part).__name__:
            found[component] = f"the file is for a {base['class']}, this is a {type(part).__name__}"
        for path in sorted(base["heads"].keys() | here.keys()) if base["heads"] != here else ():
            there_heads, here_heads = base["heads"].get(path), here.get(path)
            if there_heads != here_heads:
                found[f"{component}.{path}"] = f"{_heads(there_heads)} in the file's model, {_heads(here_heads)} here"
    return found


def _heads(count: int | None) -> str:
    return "no such attention layer" if count is None else f"{count} heads"


def _tensor_differences(
    state_dict: Mapping[str, Tensor], layers: Mapping[str, Any], allow_large_values: bool
) -> dict[str, str]:
    usable = all_usable(state_dict)
    if usable and _all_fit(state_dict, layers):
        return {}
    found = {} if state_dict else {"file": "it holds no coefficients"}
    tied: dict[int, str] = {}
    for key, delta in sorted(state_dict.items()):
        if key not in layers:
            found[key] = "there is no such attention layer"
            continue
        reason = reason_left_out(layers[key])
        if reason:
            found[key] = f"is {reason}"
            continue
        heads = head_count(layers[key])
        if not usable and (problem := value_problem(delta)):
            found[key] = problem
        elif delta.shape != (heads, heads):
            found[key] = f"must have shape {(heads, heads)} for {heads} heads, got {tuple(delta.shape)}"
        elif not (usable or allow_large_values) and (problem := too_large(delta)):
            found[key] = f"{problem} (allow_large_values=True takes them)"
        elif isinstance(getattr(layers[key], "processor", None), CoeffAttnProcessor):
            first = tied.setdefault(id(layers[key].processor.coefficients), key)
            if not torch.equal(*(x.detach().to("cpu", torch.float32) for x in (delta, state_dict[first]))):
                found[key] = f"differs from {first}, to which this layer is tied"
    return found


def _all_fit(state_dict: Mapping[str, Tensor], layers: Mapping[str, Any]) -> bool:
    """Whether they are of the shapes of layers that have coefficients and are not tied: all there is to ask there."""
    processors = [getattr(layers.get(key), "processor", None) for key in state_dict]
    held = [p.coefficients for p in processors if isinstance(p, CoeffAttnProcessor)]
    if not held or len(set(held)) < len(state_dict):
        return False
    shapes = ((coefficients.num_heads, coefficients.num_heads) for coefficients in held)
    return all(delta.shape == shape for delta, shape in zip(state_dict.values(), shapes))


def _other_layers(model: Any, adapter_name: str, state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """Layers that the adapter or the file alone has."""
    here = coeff_state_dict(model, adapter_name).keys()
    too_many = dict.fromkeys(sorted(state_dict.keys() - here), f"adapter {adapter_name!r} has no such layer")
    missing = dict.fromkeys(sorted(here - state_dict.keys()), f"adapter {adapter_name!r} has it, the file has not")
    return too_many | missing
