"""Runs the Triton kernels on CPU tensors, in Triton's interpreter, and writes what test_gpu.py asks for.

    python triton_interpreted.py RESULTS.json

A process of its own: the interpreter is chosen before triton is imported. Tiles are small, so that small inputs have
several of them, ragged at the edges, and several strips.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from coeff_diffusers import backends, mixed_attention
from coeff_diffusers.backends import gpu, loop, tiles
from coeff_diffusers.backends.tiles import Tile, Tiles
from coeff_diffusers.functional import mixed_attention_reference

BF16, FP16 = torch.bfloat16, torch.float16
SMALL = Tiles(
    plain=Tile(16, 32, 1, 1),
    exps=Tile(16, 16, 1, 1, 2),
    mix=Tile(1, 0, 1, 1),
    times=Tile(16, 16, 1, 1),
    maps=Tile(16, 32, 1, 1, 2),
    grads=Tile(1, 32, 1, 1),
    keys=Tile(16, 32, 1, 1),
    strip_bytes=2**13,
    backward_bytes=2**13,
)


class Case(NamedTuple):
    B: int
    H: int
    T: int
    S: int
    D: int
    E: int
    dtype: torch.dtype
    mask: str = "none"
    causal: bool = False
    scale: float | None = None
    unmixed: str = "none"  # heads or samples whose coefficients are zero
    size: float = 0.1  # of the coefficients


CASES = {
    "several strips": Case(1, 3, 18, 37, 20, 24, BF16),
    "several strips, float16": Case(1, 2, 17, 33, 20, 24, FP16),
    "one head": Case(1, 1, 17, 40, 16, 16, FP16, scale=-0.3),
    "a boolean mask of every entry, one row empty": Case(2, 8, 3, 45, 40, 40, BF16, "boolean"),
    "a boolean mask of keys": Case(2, 5, 2, 33, 64, 64, FP16, "keys"),
    "an additive mask of keys": Case(1, 20, 3, 20, 64, 64, BF16, "added keys"),
    "an additive mask of every head": Case(1, 5, 3, 35, 72, 72, FP16, "added"),
    "causal": Case(1, 24, 3, 18, 128, 128, BF16, causal=True),
    "38 heads": Case(1, 38, 2, 18, 64, 64, BF16),
    "some heads unmixed": Case(2, 8, 3, 40, 16, 16, BF16, "keys", unmixed="heads"),
    "a sample unmixed": Case(2, 3, 3, 40, 16, 16, FP16, unmixed="samples"),
    "nothing mixed": Case(1, 4, 17, 40, 16, 16, BF16, "boolean", unmixed="all"),
    "large coefficients": Case(1, 3, 3, 40, 16, 16, FP16, size=30.0),
    "tiles that end where the arrays end": Case(1, 2, 16, 32, 16, 16, BF16),
    "keys in several parts": Case(1, 1, 1, 520, 16, 16, FP16),
    "tiny": Case(3, 2, 1, 1, 8, 8, BF16),
}


def main(results: Path) -> None:
    torch.set_num_threads(1)
    tiles.choose = lambda *args: SMALL  # type: ignore[assignment]
    gpu._MOST_BYTES = SMALL.backward_bytes  # of a strip for the sake of its rows
    found: dict[str, Any] = {name: errors(case) for name, case in CASES.items()}
    found |= {claim.__name__: claim() for claim in CLAIMS}
    results.write_text(json.dumps(found))


def errors(case: Case) -> dict[str, Any]:
    """Ours and SDPA's own, each against float64: output and gradients of query, key, value and coefficients.

    SDPA has no coefficients; theirs are held to what it loses of the values' gradient, the largest sum next to it.
    """
    query, key, value, coeff, grad_out, mask = inputs(case)
    options = {"is_causal": case.causal, "scale": case.scale}
    wide_mask = mask.double() if mask is not None and mask.dtype != torch.bool else mask

    exact = [x.double().requires_grad_() for x in (query, key, value, coeff)]
    out = mixed_attention_reference(*exact, wide_mask, **options)
    expected = [out, *torch.autograd.grad(out, exact, grad_out.double())]

    scale = case.D**-0.5 if case.scale is None else case.scale
    out, statistics = gpu.forward(query, key, value, coeff, mask, case.causal, scale)
    rest = (mask, statistics, case.causal, scale, [True] * 4)
    ours = [out, *gpu.backward(grad_out, query, key, value, coeff, *rest)]

    narrow = [x.detach().clone().requires_grad_() for x in (query, key, value)]
    narrow_mask = mask.to(case.dtype) if mask is not None and mask.dtype != torch.bool else mask
    plain = F.scaled_dot_product_attention(*narrow, narrow_mask, **options)
    theirs = [plain, *torch.autograd.grad(plain, narrow, grad_out)]
    exact = [x.detach().double().requires_grad_() for x in narrow]
    plain = F.scaled_dot_product_attention(
        *exact,
        narrow_mask.double() if narrow_mask is not None and mask.dtype != torch.bool else narrow_mask,
        **options,
    )
    plain_expected = [plain, *torch.autograd.grad(plain, exact, grad_out.double())]
    sdpa = [relative(*pair) for pair in zip(theirs, plain_expected)]
    return {
        "ours": [relative(*pair) for pair in zip(ours, expected)],
        "sdpa": [*sdpa, sdpa[3]],
        "rounding": torch.finfo(case.dtype).eps / 2,
    }


def inputs(case: Case) -> tuple[Tensor, ...]:
    B, H, T, S, D, E, dtype, kind, *_ = case
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad_out = (
        torch.randn(B, n, H, width, generator=generator).to(dtype).transpose(1, 2)
        for n, width in ((T, D), (S, D), (S, E), (T, E))
    )
    coeff = case.size * torch.randn(B, H, H, generator=generator)
    if case.unmixed == "heads":
        coeff[:, ::2] = 0.0
        coeff[:, :, 2] = 0.0  # whose map no other head uses either
    elif case.unmixed != "none":
        coeff[0 : B if case.unmixed == "all" else 1] = 0.0
    masks: dict[str, Callable[[], Tensor | None]] = {
        "none": lambda: None,
        "boolean": lambda: torch.rand(B, 1, T, S, generator=generator) > 0.3,
        "keys": lambda: torch.rand(B, 1, 1, S, generator=generator) > 0.3,
        "added": lambda: torch.randn(B, H, T, S, generator=generator).to(dtype),
        "added keys": lambda: torch.randn(1, H, 1, S, generator=generator).to(dtype),
    }
    mask = masks[kind]()
    if kind == "boolean":
        mask[0, 0, 0] = False
    return query, key, value, coeff, grad_out, mask


def relative(found: Tensor, exact: Tensor) -> float:
    norm = exact.norm().item()
    return ((found.double() - exact).norm().item() / norm) if norm > 0 else found.double().norm().item()


# What else is promised: each returns whether it is so.


def strides_do_not_matter() -> bool:
    """Not those of inputs, nor of gradients, nor of an output's gradient that is one number for all."""
    case = CASES["several strips"]._replace(T=3)
    query, key, value, coeff, _, _ = inputs(case)
    gradient = torch.ones(1, dtype=BF16).expand(1, 3, 3, 24)
    found = []
    for order in ((0, 1, 2, 3), (0, 2, 1, 3), (0, 1, 3, 2)):
        back = [order.index(i) for i in range(4)]
        args = [x.permute(order).contiguous().permute(back) for x in (query, key, value)]
        strided = coeff[0].T.contiguous().T
        out, statistics = gpu.forward(*args, strided, None, False, 0.3)
        gradients = gpu.backward(gradient, *args, strided, None, statistics, False, 0.3, [True] * 4)
        assert [x.stride() for x in gradients[:3]] == [x.stride() for x in args]
        found.append([out, *gradients])
    shared = gpu.forward(query, key[:, :1].expand(-1, 3, -1, -1), value, coeff, None, False, 0.3)[0]
    alone = gpu.forward(query, key[:, :1].repeat(1, 3, 1, 1), value, coeff, None, False, 0.3)[0]
    return all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other)) and torch.equal(
        shared, alone
    )


def offsets_beyond_32_bits_are_right() -> bool:
    """Heads, and rows of a mask, that lie 2**31 entries apart; most of that memory is never touched."""
    query, key, value, coeff, _, _ = inputs(CASES["several strips"]._replace(H=2, T=17))
    far_key = torch.empty(2**31 + 37 * 20, dtype=BF16).as_strided(key.shape, (0, 2**31, 20, 1)).copy_(key)
    mask = torch.rand(1, 1, 17, 37, generator=torch.Generator().manual_seed(0)) > 0.3
    far_mask = torch.empty(2**31 + 37, dtype=torch.bool).as_strided(mask.shape, (0, 0, 2**27, 1)).copy_(mask)
    near, far = (gpu.forward(query, k, value, coeff, m, False, 0.3)[0] for k, m in ((key, mask), (far_key, far_mask)))
    return torch.equal(near, far)


def the_least_number_of_a_dtype_masks_evenly() -> bool:
    """A row whose keys all have it is not masked: transformers fills masks with it."""
    query, key, value, coeff, _, _ = inputs(CASES["several strips"]._replace(T=3))
    for dtype in (BF16, torch.float32):
        mask = torch.zeros(1, 1, 3, 37, dtype=dtype)
        mask[:, :, 2] = torch.finfo(dtype).min
        out = gpu.forward(query, key, value, coeff, mask, False, 0.3)[0]
        wide = [x.double() for x in (query, key, value, coeff)]
        expected = mixed_attention_reference(*wide, mask.double(), scale=0.3)
        if relative(out[:, :, 2], expected[:, :, 2]) > 1e-2:  # bfloat16's rounding is 4e-3
            return False
    return True


def a_boolean_mask_hides_even_what_is_not_a_number() -> bool:
    query, key, value, coeff, _, _ = inputs(CASES["several strips"]._replace(T=3))
    mask = torch.ones(1, 1, 3, 37, dtype=torch.bool)
    mask[..., 3] = False
    expected = gpu.forward(query, key, value, coeff, mask, False, 0.3)[0]
    key = key.clone()
    key[:, :, 3] = float("nan")
    hidden = gpu.forward(query, key, value, coeff, mask, False, 0.3)[0]
    return torch.equal(hidden, expected) and bool(expected.isfinite().all())


def what_is_not_a_number_is_not_hidden() -> bool:
    for spoilt in range(4):
        args = list(inputs(CASES["several strips"]._replace(T=3))[:4])
        args[spoilt] = args[spoilt].contiguous().clone()
        args[spoilt].view(-1)[0] = float("nan")
        out = gpu.forward(*args, None, False, 0.3)[0]
        if not out.isnan().equal(mixed_attention_reference(*args, scale=0.3).isnan()):
            return False
    return True


def equal_inputs_give_equal_bits() -> bool:
    query, key, value, coeff, grad_out, _ = inputs(CASES["several strips"]._replace(H=2))

    def run() -> list[Tensor]:
        out, statistics = gpu.forward(query, key, value, coeff, None, False, 0.3)
        return [out, *gpu.backward(grad_out, query, key, value, coeff, None, statistics, False, 0.3, [True] * 4)]

    return all(torch.equal(x, y) for x, y in zip(run(), run()))


def gradients_that_are_not_wanted_are_empty() -> bool:
    query, key, value, coeff, grad_out, _ = inputs(CASES["several strips"]._replace(T=3))
    _, statistics = gpu.forward(query, key, value, coeff, None, False, 0.3)
    args = (grad_out, query, key, value, coeff, None, statistics, False, 0.3)
    everything = gpu.backward(*args, [True] * 4)
    for wanted in ([True, False, False, False], [False, True, False, True], [False, False, True, False]):
        for found, whole, wants in zip(gpu.backward(*args, wanted), everything, wanted):
            if not (torch.equal(found, whole) if wants else found.numel() == 0):
                return False
    return True


def the_check_of_a_card_passes_and_notices_a_wrong_kernel() -> bool:
    right = gpu.check(torch.device("cpu"), BF16, 5, 20)
    forward = gpu.forward
    gpu.forward = lambda *args: (1.1 * forward(*args)[0], forward(*args)[1])  # type: ignore[assignment]
    wrong = gpu.check(torch.device("cpu"), BF16, 5, 20)
    gpu.forward = forward
    return right and not wrong


def the_operator_serves_compile_checkpointing_and_autocast() -> bool:
    """Through `mixed_attention`, with the device's type left out of what decides."""
    query, key, value, coeff, grad_out, _ = inputs(CASES["several strips"]._replace(B=1, T=9))
    gpu.takes = lambda query, key, value: query.dtype in (BF16, FP16)  # type: ignore[assignment]
    backends.set_mixing_backend("triton")
    calls = []
    forward = gpu.forward
    gpu.forward = lambda *args: calls.append(1) or forward(*args)  # type: ignore[assignment, func-returns-value]
    args = [x.detach().requires_grad_() for x in (query, key, value, coeff[0])]
    plain = mixed_attention(*args)
    gradients = torch.autograd.grad(plain, args, grad_out)
    again = checkpoint(mixed_attention, *args, use_reentrant=False)
    assert all(torch.equal(x, y) for x, y in zip(torch.autograd.grad(again, args, grad_out), gradients))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(mixed_attention, backend=counter, fullgraph=True)
    for factor in (1.0, 0.0):
        assert torch.equal(compiled(*args[:3], factor * args[3]), mixed_attention(*args[:3], factor * args[3]))
    with torch.autocast("cpu", dtype=BF16):
        cast = mixed_attention(*(x.float() for x in args[:3]), args[3])
    assert torch.equal(cast, plain)
    wide = loop.forward(*(x.float() for x in args), None, False, 20**-0.5)[0]
    return counter.frame_count == 1 and len(calls) == 8 and relative(plain, wide.double()) < 1e-2


CLAIMS = (
    strides_do_not_matter,
    offsets_beyond_32_bits_are_right,
    the_least_number_of_a_dtype_masks_evenly,
    a_boolean_mask_hides_even_what_is_not_a_number,
    what_is_not_a_number_is_not_hidden,
    equal_inputs_give_equal_bits,
    gradients_that_are_not_wanted_are_empty,
    the_check_of_a_card_passes_and_notices_a_wrong_kernel,
    the_operator_serves_compile_checkpointing_and_autocast,
)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
