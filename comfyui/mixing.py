"""A layer of ComfyUI's model whose heads share their maps.

ComfyUI asks `transformer_options["optimized_attention_override"]` to compute attention, where there is one. A layer's
own forward is called with an override that is this layer's alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from coeff_diffusers import mixed_attention

OVERRIDE = "optimized_attention_override"


class MixedForward:
    """In the place of a module's forward: the same, with its maps mixed by `I + sum_k strength_k Delta_k`.

    Args:
        forward: the module's own.
        mixture: Delta, (H, H) float32, and its strength, of each file.
    """

    def __init__(self, forward: Callable[..., Any], mixture: tuple[tuple[Tensor, float], ...]) -> None:
        self.forward, self.mixture = forward, mixture
        self.delta = torch.stack([strength * delta for delta, strength in mixture]).sum(0)
        self.calls = 0

    def __call__(self, *args: Any, transformer_options: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        options = {**(transformer_options or {}), OVERRIDE: self.attention}
        return self.forward(*args, transformer_options=options, **kwargs)

    def attention(
        self,
        func: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: torch.dtype | None = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """As ComfyUI's attention functions; the softmax and the mixing are done in float32.

        Args:
            func: the attention function that ComfyUI has chosen, which knows of no coefficients.
            q: (B, T, H * D); (B, H, T, D) with `skip_reshape`.
            k: (B, S, H * D); (B, H, S, D) with `skip_reshape`.
            v: as `k`.
            heads: H.
            mask: (T, S), (B, T, S) or (B, H, T, S), boolean or added to the scores.
            attn_precision: of the scores; they are never less than float32 here.
            skip_reshape: whether heads are a dimension of their own in the input.
            skip_output_reshape: and in the output.
            **kwargs: `scale` and `enable_gqa`, which count; ComfyUI's own, which do not.

        Returns:
            (B, T, H * D); (B, H, T, D) with `skip_output_reshape`.
        """
        self.calls += 1
        if self.delta.device != q.device:
            self.delta = self.delta.to(q.device)
        if not skip_reshape:
            width = q.shape[-1] // heads
            q, k, v = (x.unflatten(-1, (-1, width)).transpose(1, 2) for x in (q, k, v))
        if mask is not None and mask.ndim == 3:
            mask = mask.unsqueeze(1)
        counted = {name: kwargs[name] for name in ("scale", "enable_gqa") if name in kwargs}
        out = mixed_attention(q, k, v, self.delta, attn_mask=mask, **counted)
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)
