"""mixed_attention against a naive loop, against SDPA, and against its own numerical derivative."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from coeff_diffusers import functional, mixed_attention, products
from coeff_diffusers.functional import mixed_attention_reference

B, H, T, S, D, E = 2, 3, 5, 7, 4, 6
FORMS = [mixed_attention, mixed_attention_reference]


@pytest.fixture(
    autouse=True,
    params=[(1, 1), (250, 1), (2**19, 1), (250, 2), (2**19, 3)],
    ids=["a row a block", "ragged blocks", "one block", "two threads", "three threads"],
)
def division(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """How the work is divided into blocks, and over how many threads."""
    entries, threads = request.param
    monkeypatch.setattr(functional, "_BLOCK_ENTRIES_CPU", entries)
    monkeypatch.setattr(functional, "_TEAM_MIN_WORK", 0)
    torch.set_num_threads(threads)


def inputs(dtype: torch.dtype = torch.float64, per_sample: bool = False, requires_grad: bool = True) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, H, T, D), (B, H, S, D), (B, H, S, E), (B, H, H) if per_sample else (H, H)]
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [x.requires_grad_(requires_grad) for x in drawn]


def naive_loop(
    query: Tensor, key: Tensor, value: Tensor, coeff: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """out_i = sum_j (delta_ij + coeff_ij) A_j V_i, one sample, head and row at a time."""
    out = torch.zeros(B, H, T, E, dtype=torch.float64)
    for b in range(B):
        matrix = coeff if coeff.ndim == 2 else coeff[b]
        for i in range(H):
            for j in range(H):
                weight = matrix[i, j] + (1.0 if i == j else 0.0)
                for t in range(T):
                    scores = key[b, j] @ query[b, j, t] * (1 / math.sqrt(D) if scale is None else scale)
                    row = torch.softmax(scores if mask is None else scores + mask[b, j, t], dim=0)
                    out[b, i, t] += weight * (row @ value[b, i])
    return out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("per_sample", [False, True])
def test_equals_the_naive_loop(form, per_sample) -> None:
    args = inputs(per_sample=per_sample, requires_grad=False)
    torch.testing.assert_close(form(*args), naive_loop(*args))
    torch.testing.assert_close(form(*args, scale=0.3), naive_loop(*args, scale=0.3))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(B, H, T, S), (B, 1, T, S), (1, 1, T, S), (B, 1, 1, S), (H, T, S), (T, S), (S,)])
def test_additive_and_boolean_masks_of_every_broadcastable_shape(form, shape) -> None:
    args = inputs(requires_grad=False)
    boolean = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.4
    boolean[..., 0] = True
    additive = torch.zeros(shape, dtype=torch.float64).masked_fill(~boolean, -math.inf)
    expected = naive_loop(*args, mask=additive.expand(B, H, T, S))
    torch.testing.assert_close(form(*args, attn_mask=boolean), expected)
    torch.testing.assert_close(form(*args, attn_mask=additive), expected)


@pytest.mark.parametrize("form", FORMS)
def test_zero_coefficients_are_scaled_dot_product_attention(form) -> None:
    query, key, value, coeff = inputs(requires_grad=False)
    mask = torch.rand(B, 1, T, S, generator=torch.Generator().manual_seed(1)) > 0.4
    for options in ({}, {"is_causal": True}, {"attn_mask": mask}, {"scale": 0.3}):
        expected = F.scaled_dot_product_attention(query, key, value, **options)
        torch.testing.assert_close(form(query, key, value, 0 * coeff, **options), expected)


@pytest.mark.parametrize("form", FORMS)
def test_rows_without_a_key_are_zero_and_their_gradients_finite(form) -> None:
    args = inputs()
    for mask in (torch.ones(T, S, dtype=torch.bool), torch.zeros(T, S, dtype=torch.float64)):
        mask[2] = False if mask.dtype == torch.bool else -math.inf
        out = form(*args, attn_mask=mask)
        assert out[:, :, 2].eq(0).all()
        assert out[:, :, 1].ne(0).all()
        gradients = torch.autograd.grad(out.square().sum(), args)
        assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("form", FORMS)
def test_grouped_queries_repeat_key_and_value_heads(form) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value, coeff = (
        torch.randn(shape, generator=generator) for shape in [(B, 4, T, D), (B, 2, S, D), (B, 2, S, E), (4, 4)]
    )
    repeated = form(query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), coeff)
    torch.testing.assert_close(form(query, key, value, coeff, enable_gqa=True), repeated)


@pytest.mark.parametrize("division", [(100, 1)], indirect=True)  # ragged blocks take every path
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.7}, {"attn_mask": True}], ids=str)
def test_gradients_are_the_numerical_ones(per_sample, options) -> None:
    if "attn_mask" in options:
        mask = torch.rand(B, 1, T, S, generator=torch.Generator().manual_seed(1)) > 0.4
        mask[0, 0, 2] = False
        options = {"attn_mask": mask}
    assert torch.autograd.gradcheck(lambda *args: mixed_attention(*args, **options), inputs(per_sample=per_sample))


@pytest.mark.parametrize("division", [(100, 2)], indirect=True)
def test_gradients_of_a_team_are_the_numerical_ones() -> None:
    assert torch.autograd.gradcheck(mixed_attention, inputs())


@pytest.mark.parametrize("wanted", range(4), ids=["query", "key", "value", "coeff"])
def test_one_gradient_alone_is_the_reference_s(wanted) -> None:
    args = inputs(requires_grad=False)
    args[wanted].requires_grad_()
    gradients = [torch.autograd.grad(form(*args).square().sum(), args[wanted])[0] for form in FORMS]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("division", [(2**19, 1)], indirect=True)  # it is the reference that runs
def test_a_mask_that_needs_a_gradient_gets_it() -> None:
    mask = torch.randn(T, S, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    args = inputs(requires_grad=False)
    assert torch.autograd.gradcheck(lambda m: mixed_attention(*args, attn_mask=m), mask)


def test_attention_dropout_drops_map_entries_before_they_are_mixed() -> None:
    args = inputs(requires_grad=False)
    torch.manual_seed(0)
    dropped = mixed_attention(*args, dropout_p=0.5)
    torch.manual_seed(0)
    kept = F.dropout(torch.ones(B, H, T, S, dtype=torch.float64), 0.5)
    query, key, value, coeff = args
    maps = torch.softmax(query @ key.mT * D**-0.5, -1) * kept
    alpha = torch.eye(H, dtype=torch.float64) + coeff
    torch.testing.assert_close(dropped, torch.einsum("ij, bjts -> bits", alpha, maps) @ value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_lose_no_more_than_twice_what_sdpa_loses(dtype) -> None:
    """Both against float64 on the same 16-bit inputs, SDPA where it says the same: zero coefficients."""
    query, key, value, coeff = inputs(dtype, requires_grad=False)
    wide = [x.double() for x in (query, key, value)]

    def error(out: Tensor, exact: Tensor) -> float:
        assert out.dtype == dtype
        return ((out.double() - exact).norm() / exact.norm()).item()

    sdpa = error(F.scaled_dot_product_attention(query, key, value), F.scaled_dot_product_attention(*wide))
    mixed = error(mixed_attention(query, key, value, coeff.float()), naive_loop(*wide, coeff.double()))
    assert mixed <= 2 * sdpa


def test_autocast_gives_its_dtype_and_costs_no_precision_in_the_mixing() -> None:
    query, key, value, coeff = (x.detach().float() for x in inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mixed_attention(query, key, value, coeff)
    rounded = [x.bfloat16() for x in (query, key, value)]
    exact = naive_loop(*(x.double() for x in rounded), coeff.double())
    assert out.dtype == torch.bfloat16
    # half a unit in the last of bfloat16's 8 bits: the one rounding of the output
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-6)


def test_backward_under_autocast_is_backward_without() -> None:
    args = [x.detach().float().requires_grad_() for x in inputs()]
    expected = torch.autograd.grad(mixed_attention(*args).square().sum(), args)
    loss = mixed_attention(*args).square().sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gradients = torch.autograd.grad(loss, args)
    torch.testing.assert_close(gradients, expected, rtol=0, atol=0)


def test_float32_gradients_agree_with_float64() -> None:
    exact = inputs()
    single = [x.detach().float().requires_grad_() for x in exact]
    expected = torch.autograd.grad(mixed_attention_reference(*exact).square().sum(), exact)
    gradients = torch.autograd.grad(mixed_attention(*single).square().sum(), single)
    for gradient, reference in zip(gradients, expected):
        assert gradient.dtype == torch.float32
        # 1e-5 of the norm is the accuracy promised; float32 has 6e-8
        assert (gradient.double() - reference).norm() <= 1e-5 * reference.norm()


def test_gradient_checkpointing_double_use_and_inference_mode() -> None:
    args = inputs()
    plain = torch.autograd.grad(mixed_attention(*args).square().sum(), args)
    again = checkpoint(mixed_attention, *args, use_reentrant=False)
    loss = again.square().sum()
    torch.testing.assert_close(torch.autograd.grad(loss, args, retain_graph=True), plain)
    torch.testing.assert_close(torch.autograd.grad(loss, args), plain)
    twice = (mixed_attention(*args).square() + mixed_attention(*args).square()).sum()
    torch.testing.assert_close(torch.autograd.grad(twice, args), tuple(2 * gradient for gradient in plain))
    with torch.inference_mode():
        torch.testing.assert_close(mixed_attention(*args), again)


def test_non_contiguous_inputs() -> None:
    query, key, value, coeff = inputs(requires_grad=False)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    assert not strided[0].is_contiguous()
    torch.testing.assert_close(mixed_attention(*strided, coeff.T.contiguous().T), naive_loop(query, key, value, coeff))


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_float32_is_as_exact_by_either_way_of_multiplying(monkeypatch, onednn, masked) -> None:
    monkeypatch.setattr(products, "_ONEDNN", onednn)
    monkeypatch.setattr(products, "_ONEDNN_MIN_WORK", 0)
    calls = []
    linear = products.by_linear
    for module in (functional, products):
        monkeypatch.setattr(module, "by_linear", lambda a, b: calls.append(1) or linear(a, b))
    mask = torch.randn(B, 1, T, S, generator=torch.Generator().manual_seed(1)) if masked else None
    args, exact = inputs(torch.float32), inputs(torch.float64)
    out, expected = mixed_attention(*args, mask), mixed_attention_reference(*exact, mask)
    grads = torch.autograd.grad(out.square().sum(), args)
    expected_grads = torch.autograd.grad(expected.square().sum(), exact)
    for one, other in zip([out, *grads], [expected, *expected_grads]):
        assert (one - other).norm() < 1e-5 * other.norm()  # float32 itself is at 1e-7
        assert one.is_contiguous()
    assert bool(calls) == onednn


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize(("tokens", "keys"), [(13, 1), (29, 77), (31, 31)])
@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"scale": 0.3}, {"enable_gqa": True}, {"masked": True}], ids=str
)
def test_float32_is_exact_over_ragged_sizes_with_all_gradients(monkeypatch, onednn, tokens, keys, options) -> None:
    monkeypatch.setattr(products, "_ONEDNN", onednn)
    monkeypatch.setattr(products, "_ONEDNN_MIN_WORK", 0)
    generator = torch.Generator().manual_seed(0)
    groups = 2 if "enable_gqa" in options else 4
    shapes = [(B, 4, tokens, D), (B, groups, keys, D), (B, groups, keys, E), (4, 4)]
    exact = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    if "masked" in options:
        mask = torch.rand(B, 1, tokens, keys, generator=generator) > 0.5
        mask[0, 0, 3] = False  # a row without a key
        options = {"attn_mask": mask}
    single = [x.detach().float().requires_grad_() for x in exact]
    out, expected = mixed_attention(*single, **options), mixed_attention_reference(*exact, **options)
    weights = torch.randn(out.shape, generator=generator)
    grads = torch.autograd.grad((out * weights).sum(), single)
    expected_grads = torch.autograd.grad((expected * weights).sum(), exact)
    for name, one, other in zip(["out", *"qkv", "coeff"], [out, *grads], [expected, *expected_grads]):
        # with one key every map is one: queries, keys have no gradient, and what rounding leaves is of float32's size
        assert (one - other).norm() <= 1e-5 * max(other.norm(), keys == 1), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_gradients_lose_no_more_than_twice_what_sdpa_s_lose(dtype) -> None:
    """Both against float64 on the same 16-bit inputs, with zero coefficients, where both say the same."""
    *narrow, coeff = inputs(dtype)
    wide = [x.detach().double().requires_grad_() for x in narrow]
    exact = torch.autograd.grad(F.scaled_dot_product_attention(*wide).sum(), wide)
    sdpa = torch.autograd.grad(F.scaled_dot_product_attention(*narrow).sum(), narrow)
    mixed = torch.autograd.grad(mixed_attention(*narrow, 0 * coeff.detach().float()).sum(), narrow)
    for ours, theirs, true in zip(mixed, sdpa, exact):
        assert ours.dtype == dtype
        assert (ours.double() - true).norm() <= 2 * (theirs.double() - true).norm()


def test_mixing_within_one_buffer_reads_every_entry_before_it_is_written() -> None:
    """Blocks of more than eight rows, whose mixing goes in several steps, and a last block with fewer."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, H, 43, D), (B, H, S, D), (B, H, S, E), (H, H)]
    args = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    torch.testing.assert_close(mixed_attention(*args), mixed_attention_reference(*args))


def test_onednn_gets_no_strides_that_it_is_slow_with(monkeypatch) -> None:
    """Models give views of (B, tokens, H, width); such weights made a step of Stable Diffusion take minutes."""
    monkeypatch.setattr(products, "_ONEDNN_MIN_WORK", 0)
    weights = []

    class Recorded:
        def _linear_pointwise(self, x, weight, *rest):
            weights.append(weight)
            return x @ weight.mT

    monkeypatch.setattr(products.torch.ops, "mkldnn", Recorded())
    views = [torch.randn(B, n, H, D).transpose(1, 2).requires_grad_() for n in (T, S, S)]
    mixed_attention(*views, torch.randn(H, H, requires_grad=True)).sum().backward()
    assert weights
    assert all(weight.is_contiguous() or weight.mT.is_contiguous() for weight in weights)


@pytest.mark.parametrize(("samples", "tokens", "keys"), [(0, 5, S), (2, 0, S), (2, 5, 0)])
def test_empty_batch_no_queries_and_no_keys(samples, tokens, keys) -> None:
    args = [torch.randn(samples, H, tokens, D), torch.randn(samples, H, keys, D), torch.randn(samples, H, keys, E)]
    coeff = torch.randn(H, H, requires_grad=True)
    out = mixed_attention(*args, coeff)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*args) if keys == 0 else out)
    assert out.shape == (samples, H, tokens, E)
    out.sum().backward()
    assert coeff.grad is not None
    assert coeff.grad.eq(0).all()


def _shapes(query=(B, H, T, D), key=(B, H, S, D), value=(B, H, S, E), coeff=(H, H), **options):
    tensors = [torch.zeros(shape) for shape in (query, key, value, coeff)]
    return tensors, {name: torch.zeros(x) if isinstance(x, tuple) else x for name, x in options.items()}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"coeff": (4, 4)}, r"coeff must have shape \(3, 3\) for 3 heads or \(2, 3, 3\), got \(4, 4\)"),
        ({"coeff": (5, H, H)}, r"or \(2, 3, 3\), got \(5, 3, 3\)"),
        ({"query": (B, T, D)}, r"must have 4 dimensions .* got \(2, 5, 4\)"),
        ({"key": (B, H, S, 9)}, r"query \(2, 3, 5, 4\) and key \(2, 3, 7, 9\) must agree"),
        ({"value": (B, H, 8, E)}, r"key \(2, 3, 7, 4\) and value \(2, 3, 8, 6\) must agree"),
        ({"key": (B, 1, S, D), "value": (B, 1, S, E)}, "query has 3 heads and key 1: .* enable_gqa=True"),
        ({"attn_mask": (T, 9)}, r"attn_mask must be broadcastable to \(2, 3, 5, 7\), got \(5, 9\)"),
        ({"attn_mask": (T, S), "is_causal": True}, "exclude each other"),
        ({"attn_mask": torch.ones(T, S, dtype=torch.int64)}, "must be boolean or floating point, got torch.int64"),
        ({"dropout_p": -0.1}, r"dropout_p must lie in \[0, 1\], got -0.1"),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_named(wrong, message) -> None:
    tensors, options = _shapes(**wrong)
    with pytest.raises(ValueError, match=message):
        mixed_attention(*tensors, **options)


def test_compiles_into_one_graph_once_for_all_coefficients() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(mixed_attention, backend=counter, fullgraph=True)
    for scale in (1.0, 0.0, -2.0):
        *qkv, coeff = inputs(torch.float32)
        coeff = (coeff * scale).detach().requires_grad_()
        out = compiled(*qkv, coeff)
        torch.testing.assert_close(out, mixed_attention(*qkv, coeff))
        (grad,) = torch.autograd.grad(out.square().sum(), coeff)
        torch.testing.assert_close(grad, torch.autograd.grad(mixed_attention(*qkv, coeff).square().sum(), coeff)[0])
    assert counter.frame_count == 1


@pytest.mark.parametrize("masked", [True, False])
def test_the_operator_keeps_what_it_registers(masked) -> None:
    mask = torch.zeros(1, 1, T, S, dtype=torch.float64) if masked else None
    torch.library.opcheck(torch.ops.coeff_diffusers.mixed_attention, (*inputs(), mask, False, 0.5))


def test_coefficients_that_need_no_gradient_cost_none(monkeypatch) -> None:
    query, key, value, coeff = inputs()
    wanted = []
    backward = functional._blockwise_backward
    monkeypatch.setattr(functional, "_blockwise_backward", lambda *args: wanted.append(args[-1]) or backward(*args))
    mixed_attention(query, key, value, coeff.detach()).sum().backward()
    assert wanted == [[True, True, True, False]]
    with torch.no_grad():
        assert not mixed_attention(query, key, value, coeff).requires_grad


def test_a_backward_pass_within_autocast_is_the_one_without() -> None:
    *narrow, coeff = inputs(torch.bfloat16)
    args = [*narrow, coeff.float()]
    expected = torch.autograd.grad(mixed_attention(*args).sum(), narrow)
    out = mixed_attention(*args).sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(out, narrow)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=0, atol=0)  # the same operations on the same numbers
