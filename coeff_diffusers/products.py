"""Products of a matrix a head, by what computes them fastest.

On the AMD CPU where this was measured oneDNN multiplies float32 matrices up to twice as fast as MKL, which torch.bmm
and scaled_dot_product_attention call. torch reaches it through one operator only, which its compiler calls for linear
layers; where it is not there, torch.bmm does the work. MKL is as fast where a product is added to a sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_ONEDNN_MIN_WORK = 2**20  # multiplications in a product, some 20 microseconds; below, calls cost more than they bring


def multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a @ b, batched, also where `out` has fewer bits; returns out."""
    if by_onednn(a, b):
        for i in range(len(out)):
            out[i] = by_linear(a[i], b[i])
    elif out.dtype == a.dtype:
        torch.bmm(a, b, out=out)
    else:
        out.copy_(torch.bmm(a, b))
    return out


def by_onednn(a: Tensor, b: Tensor) -> bool:
    """Whether a @ b, batched, is worth a call of oneDNN for each matrix."""
    work = a.shape[1] * a.shape[2] * b.shape[2]
    return _ONEDNN and a.device.type == "cpu" and a.dtype == torch.float32 and work >= _ONEDNN_MIN_WORK


def by_linear(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of two matrices."""
    if not (b.is_contiguous() or b.mT.is_contiguous()):
        b = b.contiguous()  # oneDNN takes other strides, and then a hundred times as long
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.mT, None, "none", [], "")
    return product
