"""Quantised base models: what --quantize and --gguf_file name, as the configs of diffusers and transformers.

Coefficients touch no weight, so nothing has to be dequantised or merged for them. The linear layers of the denoiser
and of the large text encoders are held in 4 or 8 bits; all the rest (convolutions, norms, embeddings, CLIP's encoders,
the VAE) stays in the precision of the run. The libraries quantise layer by layer, as weights come from the disk.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:  # the flags' help needs no torch, which takes seconds to load
    import torch
    from torch import nn

MethodName = Literal[
    "bnb_nf4", "bnb_int8", "torchao_int8", "torchao_float8", "quanto_int8", "quanto_float8"
]  # fmt: skip
METHODS: tuple[str, ...] = get_args(MethodName)
PACKAGES = {"bnb": "bitsandbytes", "torchao": "torchao", "quanto": "optimum-quanto", "gguf": "gguf"}
MODULES = {"optimum-quanto": "optimum.quanto"}  # by the name of the package, where it is another
DEVICES = {  # that diffusers takes each on, and the CPU, for which `bitsandbytes_on_cpu` is
    "bnb_nf4": ("cuda", "xpu", "mps", "cpu"),
    "bnb_int8": ("cuda", "xpu", "cpu"),
}
_QUANTIZERS = ("bitsandbytes_4bit", "bitsandbytes_8bit", "torchao", "quanto")  # as diffusers names them
_SWAP = threading.RLock()


@dataclass(frozen=True)
class Quantization:
    """How the weights of a base model are held.

    Args:
        method: of [`METHODS`]; `None` leaves them as they are.
        gguf_file: the denoiser's weights, in the place of the base model's own. `method` is for text encoders then.
        text_encoders: whether large ones are quantised, too.
    """

    method: str | None = None
    gguf_file: str | None = None
    text_encoders: bool = True

    @property
    def wanted(self) -> bool:
        """Whether anything is asked for."""
        return bool(self.method or self.gguf_file)

    def check(self, device: str, index: Mapping[str, Any]) -> None:
        """To be called before anything is loaded.

        Args:
            device: its type.
            index: of the pipeline, as its `model_index.json` has it.

        Raises:
            ValueError: with a way out, if this cannot be had on such a device, or there is nothing to quantise.
        """
        for name in filter(None, (self.method, "gguf" if self.gguf_file else None)):
            package = PACKAGES[name.partition("_")[0]]
            if not _is_there(MODULES.get(package, package)):
                raise ValueError(f"{name} needs {package}: pip install {package}, or 'coeff_diffusers[quantize]'")
            if device not in DEVICES.get(name, (device,)):
                raise ValueError(
                    f"{name} needs one of {', '.join(DEVICES[name])}, and this runs on {device}: take torchao_int8 or "
                    "quanto_int8"
                )
        if self.method in ("bnb_nf4", "bnb_int8") and device == "cpu":
            import bitsandbytes

            if "cpu" not in getattr(bitsandbytes, "supported_torch_devices", ()):
                raise ValueError(
                    f"{self.method}: this release of bitsandbytes needs a GPU, and this runs on the CPU: "
                    "pip install -U bitsandbytes, or take torchao_int8 or quanto_int8"
                )
        if self.gguf_file and not Path(self.gguf_file).is_file():
            raise ValueError(f"there is no GGUF file {self.gguf_file}")
        if self.gguf_file and len(denoisers(index)) != 1:
            raise ValueError(f"a GGUF file holds one denoiser, and a {index.get('_class_name')} has another number")
        if self.method and not self.parts(index):
            raise ValueError(
                f"{self.method} has nothing to quantise: the denoiser is in the GGUF file, and there is no large text "
                "encoder that does not train; leave it out"
                if self.gguf_file
                else f"{self.method} finds no denoiser in a {index.get('_class_name')}"
            )

    def parts(self, index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
        """Component -> its library and class, of those in `index` that `method` quantises."""
        if self.method is None:
            return {}
        found = {} if self.gguf_file else denoisers(index)
        return found | (large_text_encoders(index) if self.text_encoders else {})

    def config(self, library: str, dtype: torch.dtype) -> Any:
        """The config of `method`, for models of a library that compute in `dtype`."""
        assert self.method is not None
        backend, _, weights = self.method.partition("_")
        return _CONFIGS[backend](_library(library), weights, dtype)

    def arguments(
        self, index: Mapping[str, Any], source: str, dtype: torch.dtype, revision: str | None = None
    ) -> dict[str, Any]:
        """Arguments of `DiffusionPipeline.from_pretrained(source)`: its `quantization_config`, and a denoiser of GGUF.

        Args:
            index: of the pipeline.
            source: a folder in diffusers format, or a name on the Hub.
            dtype: of what is not quantised, and of the computation.
            revision: of `source` on the Hub.
        """
        arguments: dict[str, Any] = dict(self.gguf_denoiser(index, source, dtype, revision))
        if parts := self.parts(index):
            from diffusers import PipelineQuantizationConfig

            configs = {name: self.config(library, dtype) for name, (library, _) in parts.items()}
            arguments["quantization_config"] = PipelineQuantizationConfig(quant_mapping=configs)
        return arguments

    def gguf_denoiser(
        self, index: Mapping[str, Any], source: str, dtype: torch.dtype, revision: str | None = None
    ) -> dict[str, nn.Module]:
        """The denoiser of `gguf_file`, by its component's name, with its config from `source`; nothing without a file.

        Raises:
            ValueError: if the file is not of this denoiser.
        """
        if not self.gguf_file:
            return {}
        import diffusers

        found = denoisers(index)
        if not found:  # what is loaded is the rest
            return {}
        [(name, (_, cls))] = found.items()
        try:
            denoiser = getattr(diffusers, cls).from_single_file(
                self.gguf_file,
                config=source,
                subfolder=name,
                quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=dtype),
                dtype=dtype,
                config_revision=revision,
            )
        except Exception as error:  # what the conversion meets in a file of another model is anything
            raise ValueError(f"{self.gguf_file} is no {cls} of {source}: {type(error).__name__}: {error}") from error
        denoiser.register_to_config(_name_or_path=source)  # as from_pretrained has it, for files of coefficients
        return {name: denoiser}

    def single_file_parts(
        self, index: Mapping[str, Any], file: str, config: str, dtype: torch.dtype, device: str
    ) -> dict[str, nn.Module]:
        """Components of `from_single_file`'s pipeline that are loaded before it: those that are quantised.

        Args:
            index: of the pipeline.
            file: of its weights.
            config: a folder in diffusers format, or a name on the Hub. Text encoders come from there.
            dtype: as of `arguments`.
            device: that the denoiser is quantised on.
        """
        loaded = self.gguf_denoiser(index, config, dtype)
        for name, (library, cls) in self.parts(index).items():
            kind = getattr(_library(library), cls)
            common = {"subfolder": name, "quantization_config": self.config(library, dtype), "dtype": dtype}
            if library == "diffusers":
                with _changed_quantizers(_for_plain_files, *_QUANTIZERS):
                    loaded[name] = kind.from_single_file(file, config=config, device=device, **common)
            else:
                loaded[name] = kind.from_pretrained(config, **common)
        return loaded

    @contextmanager
    def loading(self) -> Iterator[None]:
        """What is said of the weights inside is told with a way out."""
        try:
            with bitsandbytes_on_cpu(), _changed_quantizers(_without_files, *_QUANTIZERS):
                yield
        except ValueError as error:
            if self.method is None:
                raise
            raise ValueError(
                f"{error}\nIf it was saved quantised, it loads as it is: leave --quantize {self.method} out"
            ) from error

    def check_loaded(self, pipeline: Any, index: Mapping[str, Any]) -> None:
        """Raises ValueError if the base model was quantised before, in another way, which loading prefers."""
        for name in self.parts(index):
            found = quantization_of(getattr(pipeline, name))
            if found != self.method:
                raise ValueError(f"the {name} is quantised already, as {found}, and not as {self.method}")


def denoisers(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Component -> library and class, of the UNets and transformers in a pipeline's `model_index.json`."""
    return {
        name: said
        for name, said in _components(index).items()
        if said[0] == "diffusers" and name.startswith(("unet", "transformer", "prior"))
    }


def text_encoders(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Likewise, of the text encoders."""
    return {name: said for name, said in _components(index).items() if name.startswith("text_encoder")}


def large_text_encoders(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Likewise, of the text encoders but CLIP's, which are small."""
    return {
        name: said
        for name, said in text_encoders(index).items()
        if said[0] == "transformers" and not said[1].startswith("CLIP")
    }


def quantization_of(model: Any) -> str | None:
    """How a model of diffusers or transformers was quantised, of [`METHODS`] where it can; `None` if it was not."""
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    if config is None:
        return None
    method = str(getattr(config.quant_method, "value", config.quant_method))
    if method == "bitsandbytes":
        return "bnb_int8" if config.load_in_8bit else f"bnb_{config.bnb_4bit_quant_type}"
    if method == "torchao":
        kind = type(config.quant_type).__name__
        known = {"Int8WeightOnlyConfig": "torchao_int8", "Float8WeightOnlyConfig": "torchao_float8"}
        return known.get(kind, f"torchao {kind}")
    if method == "quanto":
        return f"quanto_{getattr(config, 'weights_dtype', None) or config.weights}"
    return method


def parameter_count(parameter: nn.Parameter) -> int:
    """How many numbers a parameter stands for, also where two of them lie in a byte."""
    state = getattr(parameter, "quant_state", None)
    shape = getattr(parameter, "quant_shape", None) if state is None else state.shape  # of bitsandbytes; of GGUF
    return parameter.numel() if shape is None else math.prod(shape)


@contextmanager
def bitsandbytes_on_cpu() -> Iterator[None]:
    """Inside, diffusers loads models of bitsandbytes where there is no GPU, by the kernels that bitsandbytes has.

    diffusers itself refuses to, as transformers does not.
    """
    import torch

    if torch.accelerator.is_available():
        yield
        return
    with _changed_quantizers(_for_cpu, "bitsandbytes_4bit", "bitsandbytes_8bit"):
        yield


@contextmanager
def _changed_quantizers(change: Callable[[Any], Any], *names: str) -> Iterator[None]:
    """Inside, diffusers takes changed classes for these ways of quantising."""
    from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    with _SWAP:
        before = {name: AUTO_QUANTIZER_MAPPING[name] for name in names}
        AUTO_QUANTIZER_MAPPING.update({name: change(kind) for name, kind in before.items()})
        try:
            yield
        finally:
            AUTO_QUANTIZER_MAPPING.update(before)


def _without_files(quantizer: Any) -> Any:
    """A quantizer of diffusers that copies what it leaves as it is.

    A file is mapped into memory, and stays there, all of it, for the biases and norms that are still in use.
    """

    def finish(self: Any, model: Any, **kwargs: Any) -> Any:
        for tensor in (*model.parameters(), *model.buffers()):
            if type(tensor) in (torch.Tensor, torch.nn.Parameter) and type(tensor.data) is torch.Tensor:
                tensor.data = tensor.data.clone()
        return quantizer._process_model_after_weight_loading(self, model, **kwargs)

    import torch

    return type(quantizer.__name__, (quantizer,), {"_process_model_after_weight_loading": finish})


def _for_plain_files(quantizer: Any) -> Any:
    """A quantizer of diffusers, for `from_single_file`, which (in 0.42.1) takes any file for one that is quantised."""

    def init(self: Any, config: Any, **kwargs: Any) -> None:
        quantizer.__init__(self, config, **kwargs | {"pre_quantized": False})

    return type(quantizer.__name__, (quantizer,), {"__init__": init})


def _for_cpu(quantizer: Any) -> Any:
    """A quantizer of diffusers that does not ask for a GPU, nor put the model on one."""

    def check_nothing(self: Any, *args: Any, **kwargs: Any) -> None:
        """The package is there: its config could not be made without."""

    def keep_device_map(self: Any, device_map: Any) -> Any:
        return device_map

    def keep_gradients(self: Any, model: Any, **kwargs: Any) -> Any:
        """CPUs with bfloat16 would have the weights packed in the first image, after which no gradient passes."""
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return quantizer._process_model_after_weight_loading(self, model, **kwargs)

    changed = {
        "validate_environment": check_nothing,
        "update_device_map": keep_device_map,
        "_process_model_after_weight_loading": keep_gradients,
    }
    return type(quantizer.__name__, (quantizer,), changed)


def _components(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    pairs = {name: tuple(said) for name, said in index.items() if isinstance(said, list | tuple) and len(said) == 2}
    return {name: said for name, said in pairs.items() if all(isinstance(each, str) for each in said)}


def _library(name: str) -> Any:
    return importlib.import_module(name)


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def _bitsandbytes(library: Any, weights: str, dtype: torch.dtype) -> Any:
    if weights == "int8":
        return library.BitsAndBytesConfig(load_in_8bit=True)
    return library.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=weights,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,  # of the scales, as QLoRA has it (arXiv 2305.14314): 4.13 bits, not 4.5
    )


def _torchao(library: Any, weights: str, dtype: torch.dtype) -> Any:
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    kind = {"int8": Int8WeightOnlyConfig, "float8": Float8WeightOnlyConfig}[weights]
    return library.TorchAoConfig(kind(set_inductor_config=False))


def _quanto(library: Any, weights: str, dtype: torch.dtype) -> Any:
    name = "weights" if library.__name__ == "transformers" else "weights_dtype"
    return library.QuantoConfig(**{name: weights})


_CONFIGS: dict[str, Callable[[Any, str, torch.dtype], Any]] = {
    "bnb": _bitsandbytes,
    "torchao": _torchao,
    "quanto": _quanto,
}
