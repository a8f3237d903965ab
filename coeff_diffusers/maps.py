"""Where each head looks for a word of the prompt: its attention maps over the image, before and after mixing.

    before_j = the columns of maps_j that belong to the word, summed        j = 1..H
    after_i  = sum_j (I + Delta)_ij before_j                                i = 1..H

Mixing is linear, so that the second is exact: `mixed maps @ values` is what the layer computes.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .adapters import denoisers
from .backends.common import masked, softmax
from .layers import attention_kind, attention_layers, matches, processor_name
from .words import token_positions

_ENTRIES = 2**22  # of maps at once, all heads: 16 MB

# Joint layers whose sequence begins with the image; in the others that are known here it ends with it.
_IMAGE_FIRST = ("JointAttnProcessor", "FusedJointAttnProcessor", "PAGJointAttnProcessor", "SD3IPAdapterJoint")
_TEXT_FIRST = ("FluxAttnProcessor", "FusedFluxAttnProcessor", "FluxIPAdapterAttnProcessor")


@dataclass(frozen=True)
class AttentionMaps:
    """What [`attention_maps`] returns.

    Args:
        image: that the prompt gave.
        positions: of the word's tokens among those of the text.
        before: layer, `component.path` -> (H, h, w) float32 on the CPU: how much of its attention head j has on the
            word at each place of the image, from 0 to 1, the mean over the steps.
        after: the same of the mixed maps, with which head i's values are weighted; may be negative or above 1. As
            `before` where no coefficients take part.
        steps: over which denoising steps, from 0 on, the mean was taken.
    """

    image: Image.Image
    positions: tuple[int, ...]
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    steps: tuple[int, ...]

    def most_changed(self) -> list[str]:
        """The layers, those first whose maps the coefficients change most: by ||after - before|| / ||before||."""
        change = {
            path: float((self.after[path] - before).norm() / before.norm().clamp_min(1e-12))
            for path, before in self.before.items()
        }
        return sorted(change, key=lambda path: -change[path])


def attention_maps(
    pipe: Any,
    prompt: str,
    word: str | Sequence[int],
    *,
    layers: str | Sequence[str] | None = None,
    steps: Collection[int] | None = None,
    **call: Any,
) -> AttentionMaps:
    """Generates an image, and records where every head of every layer looks for a word of its prompt.

    Of pipelines with cross-attention to the text (Stable Diffusion 1.x, 2.x and XL, PixArt), of Stable Diffusion 3 and
    of FLUX.1, with coefficients or without. Of guidance's two halves the prompt's own counts. Memory: 16 MB for a
    layer's maps at work, and the word's maps, H * h * w numbers a layer.

    Args:
        pipe: the pipeline, with the adapters that are to count active; not compiled.
        prompt: one prompt.
        word: a word or several in a row, as they stand in the prompt: "fox", "fox face"; their tokens are summed. Or
            positions in the text's tokens, for pipelines whose tokenizers are not known here.
        layers: shell-style patterns on the layers' paths or on their ends: `"up_blocks.*"`. `None` takes all that see
            the text.
        steps: the denoising steps, from 0 on, over which the mean is taken; `None` takes all.
        **call: of the pipeline's call: `generator`, `num_inference_steps`, ...

    Raises:
        ValueError: if the word is not in the prompt, or was cut off; if no layer is selected; for several prompts or
            images, or another `output_type`; for layers of an unknown kind, or steps that the call has not.
        RuntimeError: if the layers were called and no attention was seen, as in a compiled model.
    """
    if not isinstance(prompt, str) or call.get("num_images_per_prompt", 1) != 1:
        raise ValueError("attention maps are of one prompt and one image: call once for each")
    if call.get("output_type", "pil") != "pil" or not call.get("return_dict", True):
        raise ValueError("attention maps are of an image: leave output_type and return_dict out")
    if steps is not None and not steps:
        raise ValueError("steps must name a denoising step, got none; None takes all")
    positions = token_positions(pipe, prompt, word) if isinstance(word, str) else _checked_positions(word)
    record = _Record(positions, None if steps is None else frozenset(steps))
    with record.attached(pipe, (layers,) if isinstance(layers, str) else layers):
        image = pipe(prompt=prompt, **call).images[0]
    missing = sorted((record.wanted or set()) - set(range(record.step + 1)))
    if missing:
        raise ValueError(f"the call has the denoising steps 0 to {record.step}, and not {missing}")
    if not record.sums:
        raise RuntimeError(
            "the model ran, and no attention was seen: record of a pipeline that is not compiled, with attention by "
            "scaled_dot_product_attention (model.set_attention_backend('native'))"
        )
    means = {path: (sums / record.counts[path]).cpu() for path, sums in record.sums.items()}
    return AttentionMaps(
        image,
        positions,
        before={path: mean[0] for path, mean in means.items()},
        after={path: mean[1] for path, mean in means.items()},
        steps=tuple(sorted(record.taken)),
    )


def _checked_positions(given: Any) -> tuple[int, ...]:
    positions = tuple(given) if isinstance(given, Sequence) else ()
    if not positions or not all(isinstance(position, int) and position >= 0 for position in positions):
        raise ValueError(f"the word must be of the prompt, or a list of positions from 0 on, got {given!r}")
    return positions


def overlay_map(image: Image.Image, weights: Tensor, *, limit: float | None = None) -> Image.Image:
    """The image with a map over it: red where it is positive, blue where negative; the image shows where it is 0.

    Args:
        image: of any size.
        weights: (h, w), of [`AttentionMaps`]; scaled up to the image's size.
        limit: the magnitude that is drawn in full colour, the same for maps that are to be compared. By default the
            largest of this map.
    """
    limit = float(weights.abs().max()) if limit is None else limit
    size = image.height, image.width
    grown = F.interpolate(weights[None, None].float(), size=size, mode="bicubic", align_corners=False)[0, 0]
    share = (grown / (limit or 1.0)).clamp(-1.0, 1.0)
    gray = torch.frombuffer(bytearray(image.convert("L").tobytes()), dtype=torch.uint8).view(size).float()
    colour = torch.where(share[..., None] > 0, torch.tensor([230.0, 30.0, 30.0]), torch.tensor([30.0, 60.0, 230.0]))
    strength = share.abs()[..., None]
    mixed = (1 - strength) * (128 + 0.5 * gray[..., None]) + strength * colour  # the image, pale, under the colours
    return Image.frombytes("RGB", (image.width, image.height), mixed.clamp(0, 255).byte().numpy().tobytes())


def maps_of_keys(
    query: Tensor, key: Tensor, columns: Sequence[int], attn_mask: Tensor | None, is_causal: bool, scale: float
) -> Iterator[Tensor]:
    """The columns of all heads' maps, a block of query rows at a time: (H, rows, columns), float32.

    Args:
        query: (H, T, D).
        key: (H, S, D).
        columns: positions of keys.
        attn_mask: broadcastable to (H, T, S).
        is_causal: masks keys s > t.
        scale: factor on the scores.
    """
    H, T, _ = query.shape
    rows = max(1, _ENTRIES // (H * key.shape[1]))
    for start in range(0, T, rows):
        part = None
        if attn_mask is not None:
            part = attn_mask[:, start : start + rows] if attn_mask.shape[1] > 1 else attn_mask
        scores = query[:, start : start + rows].float() @ key.float().transpose(1, 2) * scale
        yield softmax(masked(scores, part, is_causal, start), part is not None)[..., list(columns)]


@dataclass(eq=False)
class _Record(TorchFunctionMode):
    """Sees the attention calls of a pipeline in its own thread, and sums up the word's maps: (2, H, h, w).

    Other threads may call the model meanwhile; its hooks pass them over.
    """

    positions: tuple[int, ...]
    wanted: frozenset[int] | None
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    taken: set[int] = field(default_factory=set)
    step: int = -1
    timestep: float | None = None
    active: bool = False
    layer: tuple[str, Any] | None = None  # that is running, until its call for attention was seen
    text: int = 0
    size: tuple[int, int] = (0, 0)
    grid: tuple[int, int] | None = None
    thread: int = field(default_factory=threading.get_ident)

    def __post_init__(self) -> None:
        super().__init__()

    @contextmanager
    def attached(self, pipe: Any, patterns: Sequence[str] | None) -> Iterator[None]:
        with ExitStack() as stack:
            parts = denoisers(pipe)
            chosen = _layers(parts, patterns)
            for part in parts.values():
                stack.callback(part.register_forward_pre_hook(self.begin, with_kwargs=True).remove)
            for path, layer in chosen.items():
                stack.callback(layer.register_forward_pre_hook(self.entering(path)).remove)
                stack.callback(layer.register_forward_hook(self.leave, always_call=True).remove)
            stack.enter_context(self)
            yield

    def begin(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Before a call of the denoiser: which step it is, and what there is of text and image."""
        if self.is_elsewhere():
            return
        given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
        timestep = float(torch.as_tensor(given["timestep"]).flatten()[0])
        first = timestep != self.timestep  # another with the same one is guidance's, of the negative prompt
        self.timestep, self.step = timestep, self.step + first
        self.active = first and (self.wanted is None or self.step in self.wanted)
        if not self.active:
            return
        self.taken.add(self.step)
        self.text = given["encoder_hidden_states"].shape[1]
        if max(self.positions) >= self.text:
            raise ValueError(f"positions must be below {self.text}, the text's tokens, got {list(self.positions)}")
        sample = given["sample"] if "sample" in given else given["hidden_states"]
        self.size, self.grid = tuple(sample.shape[-2:]), None
        if sample.ndim == 3 and given.get("img_ids") is not None:
            ids = given["img_ids"].reshape(-1, 3)
            self.grid = int(ids[:, 1].max()) + 1, int(ids[:, 2].max()) + 1

    def entering(self, path: str) -> Callable[..., None]:
        def enter(layer: nn.Module, args: Any) -> None:
            if not self.is_elsewhere():
                self.layer = (path, layer) if self.active else None

        return enter

    def leave(self, layer: nn.Module, args: Any, output: Any) -> None:
        if not self.is_elsewhere():
            self.layer = None

    def is_elsewhere(self) -> bool:
        return threading.get_ident() != self.thread

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.layer is not None:
            if func is F.scaled_dot_product_attention:
                self.take(*_plain_call(*args, **kwargs))
            elif func is torch.ops.coeff_diffusers.mixed_attention.default:
                query, key, _, coeff, attn_mask, is_causal, scale = args
                self.take(query, key, coeff, attn_mask, is_causal, scale)
        return func(*args, **kwargs)

    @torch.no_grad()
    def take(
        self, query: Tensor, key: Tensor, coeff: Tensor | None, attn_mask: Tensor | None, is_causal: bool, scale: float
    ) -> None:
        """Adds the maps of the batch's last sample: of the prompt, where guidance has doubled the batch."""
        assert self.layer is not None
        (path, layer), self.layer = self.layer, None
        rows, columns = self.places(path, layer, query.shape[2], key.shape[2])
        if attn_mask is not None:
            attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)][-1]
            attn_mask = attn_mask[:, rows] if attn_mask.shape[1] > 1 else attn_mask
        blocks = maps_of_keys(query[-1][:, rows], key[-1], columns, attn_mask, is_causal, scale)
        before = torch.cat([block.sum(-1) for block in blocks], dim=1)  # (H, T)
        after = before
        if coeff is not None:
            delta = (coeff if coeff.ndim == 2 else coeff[-1]).float()
            after = before + delta.to(before.device) @ before
        grid = self.grid or _grid(before.shape[1], self.size)
        if math.prod(grid) != before.shape[1]:
            raise ValueError(f"{before.shape[1]} tokens are no image of {grid}: call without reference images")
        found = torch.stack([before, after]).unflatten(-1, grid)
        self.sums[path] = self.sums[path] + found if path in self.sums else found
        self.counts[path] = self.counts.get(path, 0) + 1

    def places(self, path: str, layer: Any, queries: int, keys: int) -> tuple[slice, list[int]]:
        """The image's query rows, and the word's columns."""
        if attention_kind(path, layer) == "cross":
            if keys != self.text:
                raise ValueError(f"{path} has {keys} keys for the text's {self.text} tokens; leave it out by layers=")
            return slice(None), list(self.positions)
        if processor_name(layer).startswith(_IMAGE_FIRST):
            image = queries - self.text
            return slice(image), [image + position for position in self.positions]
        return slice(self.text, None), list(self.positions)


def _layers(parts: dict[str, nn.Module], patterns: Sequence[str] | None) -> dict[str, Any]:
    found = {
        f"{component}.{path}": layer
        for component, part in parts.items()
        for path, layer in attention_layers(part).items()
        if attention_kind(path, layer) != "self"
    }
    chosen = {
        path: layer for path, layer in found.items() if patterns is None or any(matches(path, p) for p in patterns)
    }
    if not chosen:
        raise ValueError(f"no layer that sees the text matches {patterns}; there are {list(found)[:5]} ...")
    joint = [processor_name(layer) for path, layer in chosen.items() if attention_kind(path, layer) == "joint"]
    unknown = sorted({name for name in joint if not name.startswith(_IMAGE_FIRST + _TEXT_FIRST)})
    if unknown:
        raise ValueError(f"where text and image stand in the sequence of {unknown} is not known here")
    return chosen


def _plain_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor, None, Tensor | None, bool, float]:
    """Of a call of `scaled_dot_product_attention`, what its maps depend on."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return query, key, None, attn_mask, is_causal, query.shape[-1] ** -0.5 if scale is None else scale


def _grid(tokens: int, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of an image's tokens, of latents of this size, which layers halve and patches divide."""
    factor = 1
    while factor <= max(size):
        height, width = (math.ceil(side / factor) for side in size)
        if height * width == tokens:
            return height, width
        factor *= 2
    raise ValueError(f"{tokens} tokens are no grid of latents of {size[0]} x {size[1]}")
