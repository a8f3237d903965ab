"""mixed_attention against a naive loop, against SDPA, and against its own numerical derivative."""

from __future__ import annotations

import math
import threading
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from coeff_diffusers import functional, mixed_attention
from coeff_diffusers.backends import cpu, loop
from coeff_diffusers.functional import mixed_attention_reference

B, H, T, S, D, E = 2, 3, 5, 7, 4, 6


class Way(NamedTuple):
    """What computes, and how it divides the work."""

    instructions: str | None  # of the kernel; None: torch's functions
    entries: int = 2**19  # of a block of theirs
    threads: int = 1
    tile_keys: int = 64
    floats: int = 2**21  # of a block of the kernel; few: threads share it in the backward pass

    @property
    def dtype(self) -> torch.dtype:
        """In which the way is tested where a test does not say: the kernel has no float64."""
        return torch.float32 if self.instructions else torch.float64


BY_TORCH = {
    "torch, a row a block": Way(None, entries=1),
    "torch, ragged blocks": Way(None, entries=250),
    "torch, one block": Way(None),
}
BY_KERNEL = {
    "AVX-512": Way("AVX512"),
    "AVX-512, three threads": Way("AVX512", threads=3, tile_keys=3),
    "AVX-512, two threads that share blocks": Way("AVX512", threads=2, tile_keys=3, floats=1),
    "AVX2": Way("AVX2"),
    "AVX2, two threads": Way("AVX2", threads=2, tile_keys=5),
    "AVX2, three threads that share blocks": Way("AVX2", threads=3, tile_keys=2, floats=1),
}
WAYS = BY_TORCH | BY_KERNEL
BEST = torch.backends.cpu.get_cpu_capability()
RUNS = {"AVX512": {"AVX512", "AVX2"}, "AVX2": {"AVX2"}}.get(BEST, set())


def ways(chosen: dict[str, Way]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("way", chosen.values(), ids=list(chosen), indirect=True)


@pytest.fixture(autouse=True, params=WAYS.values(), ids=list(WAYS))
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Way:
    way: Way = request.param
    if way.instructions and way.instructions not in RUNS:
        pytest.skip(f"this CPU has no {way.instructions}")
    library = cpu._load(way.instructions) if way.instructions else None
    monkeypatch.setattr(cpu, "_library", lambda: library)
    monkeypatch.setattr(loop, "_BLOCK_ENTRIES_CPU", way.entries)
    monkeypatch.setattr(cpu, "_THREAD_MIN_WORK", 1)
    monkeypatch.setattr(cpu, "_TILE_KEYS", way.tile_keys)
    monkeypatch.setattr(cpu, "_BLOCK_FLOATS", way.floats)
    torch.set_num_threads(way.threads)
    return way


def inputs(dtype: torch.dtype = torch.float64, per_sample: bool = False, requires_grad: bool = True) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, H, T, D), (B, H, S, D), (B, H, S, E), (B, H, H) if per_sample else (H, H)]
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [x.requires_grad_(requires_grad) for x in drawn]


def assert_exact(found: Tensor, expected: Tensor, least: float = 0.0) -> None:
    """Within 1e-5 of the norm in float32, whose own rounding is 6e-8, or 1e-12 in float64."""
    assert found.shape == expected.shape
    tolerance = 1e-12 if found.dtype == torch.float64 else 1e-5
    assert (found.double() - expected.double()).norm() <= tolerance * max(expected.double().norm(), least)


def gradients(out: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Of the output times numbers that differ from entry to entry."""
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    return torch.autograd.grad((out * weights).sum(), inputs)


def test_the_kernel_was_built() -> None:
    """Where it can be: without it the tests of the kernel would only say that torch's functions are right."""
    for instructions in RUNS:
        assert cpu._load(instructions) is not None, "no compiled kernel: is there a compiler? Then `make install`"


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


@pytest.mark.parametrize("per_sample", [False, True])
def test_equals_the_naive_loop(way, per_sample) -> None:
    exact = inputs(per_sample=per_sample, requires_grad=False)
    args = [x.to(way.dtype) for x in exact]
    mask = torch.randn(B, H, T, S, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for attention in (mixed_attention, mixed_attention_reference):
        assert_exact(attention(*args), naive_loop(*exact))
        assert_exact(attention(*args, scale=0.3), naive_loop(*exact, scale=0.3))
        assert_exact(attention(*args, attn_mask=mask.to(way.dtype)), naive_loop(*exact, mask=mask))


@pytest.mark.parametrize("shape", [(B, H, T, S), (B, 1, T, S), (1, 1, T, S), (B, 1, 1, S), (H, T, S), (T, S), (S,)])
def test_additive_and_boolean_masks_of_every_broadcastable_shape(way, shape) -> None:
    exact = inputs(requires_grad=False)
    args = [x.to(way.dtype) for x in exact]
    boolean = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.4
    boolean[..., 0] = True
    additive = torch.zeros(shape, dtype=way.dtype).masked_fill(~boolean, -math.inf)
    expected = naive_loop(*exact, mask=additive.double().expand(B, H, T, S))
    assert_exact(mixed_attention(*args, attn_mask=boolean), expected)
    assert_exact(mixed_attention(*args, attn_mask=additive), expected)
    assert_exact(mixed_attention(*args, attn_mask=additive.bfloat16()), expected)
    if len(shape) > 1:
        strided = boolean.mT.contiguous().mT
        assert_exact(mixed_attention(*args, attn_mask=strided), expected)


def test_zero_coefficients_are_scaled_dot_product_attention(way) -> None:
    query, key, value, coeff = inputs(way.dtype, requires_grad=False)
    mask = torch.rand(B, 1, T, S, generator=torch.Generator().manual_seed(1)) > 0.4
    for options in ({}, {"is_causal": True}, {"attn_mask": mask}, {"scale": 0.3}):
        expected = F.scaled_dot_product_attention(query, key, value, **options)
        assert_exact(mixed_attention(query, key, value, 0 * coeff, **options), expected)


def test_rows_without_a_key_are_zero_and_their_gradients_finite(way) -> None:
    args = inputs(way.dtype)
    for mask in (torch.ones(T, S, dtype=torch.bool), torch.zeros(T, S, dtype=way.dtype)):
        mask[2] = False if mask.dtype == torch.bool else -math.inf
        for attention in (mixed_attention, mixed_attention_reference):
            out = attention(*args, attn_mask=mask)
            assert out[:, :, 2].eq(0).all()
            assert out[:, :, 1].ne(0).all()
            assert all(torch.isfinite(gradient).all() for gradient in gradients(out, args))


def test_a_row_whose_keys_all_have_the_lowest_mask_is_not_masked(way) -> None:
    """transformers fills masks with the least number of a dtype, beside which scores are lost: an even map."""
    args, exact = inputs(way.dtype), inputs()
    mask = torch.zeros(T, S, dtype=way.dtype)
    mask[2] = torch.finfo(way.dtype).min
    out, expected = mixed_attention(*args, mask), mixed_attention_reference(*exact, mask.double())
    assert_exact(out, expected)
    for one, other in zip(gradients(out, args), gradients(expected, exact)):
        assert_exact(one, other)


def test_masks_of_any_size_after_keys_that_are_masked(way) -> None:
    """e^89 is beyond float32: nothing may be multiplied by it, though what it would be multiplied by is zero."""
    *_, value, coeff = inputs(way.dtype, requires_grad=False)
    nothing = torch.zeros(B, H, 40, D, dtype=way.dtype), torch.zeros(B, H, S, D, dtype=way.dtype)
    mask = torch.full((40, S), -math.inf, dtype=way.dtype)
    mask[:, S - 2 :] = torch.linspace(-90, -87, 40, dtype=way.dtype)[:, None]
    expected = mixed_attention_reference(*(x.double() for x in (*nothing, value, coeff, mask)))
    assert_exact(mixed_attention(*nothing, value, coeff, mask), expected)


@pytest.mark.parametrize("value", [89.0, 266.5, 1e30])
def test_large_masks_leave_rows_that_are_not_there_alone(way, value) -> None:
    """T is no multiple of a strip: what fills it up must not reach the sums over rows, which gradients of keys are."""
    exact = inputs()
    mask = torch.zeros(S, dtype=torch.float64)
    mask[3:] = value
    expected = mixed_attention_reference(*exact, mask)
    args = [x.detach().to(way.dtype).requires_grad_() for x in exact]
    out = mixed_attention(*args, mask.to(way.dtype))
    for one, other in zip([out, *gradients(out, args)], [expected, *gradients(expected, exact)]):
        # of float32 scores of 89 and more the last digits are lost; those of 1e30 are all the same
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-4 if value < 1e3 else math.inf)
        assert one.isfinite().all()


def test_a_boolean_mask_hides_even_what_is_not_a_number(way) -> None:
    query, key, value, coeff = inputs(way.dtype, requires_grad=False)
    for shape in ((T, S), (S,)):
        mask = torch.ones(shape, dtype=torch.bool)
        mask[..., 3] = False
        expected = mixed_attention(query, key, value, coeff, mask)
        for hidden in (math.nan, math.inf):
            spoilt = key.clone()
            spoilt[:, :, 3] = hidden
            torch.testing.assert_close(mixed_attention(query, spoilt, value, coeff, mask), expected)


def test_what_is_not_a_number_is_not_hidden(way) -> None:
    for spoilt in range(4):
        args = inputs(way.dtype, requires_grad=False)
        args[spoilt].view(-1)[0] = math.nan
        out, expected = mixed_attention(*args), mixed_attention_reference(*args)
        assert expected.isnan().any()
        assert out.isnan().equal(expected.isnan())


def test_grouped_queries_repeat_key_and_value_heads(way) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value, coeff = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(way.dtype)
        for shape in [(B, 4, T, D), (B, 2, S, D), (B, 2, S, E), (4, 4)]
    )
    repeated = mixed_attention_reference(query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), coeff)
    assert_exact(mixed_attention(query, key, value, coeff, enable_gqa=True), repeated)
    assert_exact(mixed_attention_reference(query, key, value, coeff, enable_gqa=True), repeated)


@ways({"torch, ragged blocks": Way(None, entries=100)})  # the kernel's are held to the reference's
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.7}, {"attn_mask": True}], ids=str)
def test_gradients_are_the_numerical_ones(per_sample, options) -> None:
    if "attn_mask" in options:
        mask = torch.rand(B, 1, T, S, generator=torch.Generator().manual_seed(1)) > 0.4
        mask[0, 0, 2] = False
        options = {"attn_mask": mask}
    assert torch.autograd.gradcheck(lambda *args: mixed_attention(*args, **options), inputs(per_sample=per_sample))


@pytest.mark.parametrize("wanted", range(4), ids=["query", "key", "value", "coeff"])
def test_one_gradient_alone_is_the_reference_s(way, wanted) -> None:
    found = []
    for attention in (mixed_attention, mixed_attention_reference):
        args = inputs(way.dtype, requires_grad=False)
        args[wanted].requires_grad_()
        found += gradients(attention(*args), [args[wanted]])
    assert_exact(*found)


@ways({"torch": Way(None)})  # it is the reference that runs
def test_a_mask_that_needs_a_gradient_gets_it() -> None:
    mask = torch.randn(T, S, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    args = inputs(requires_grad=False)
    assert torch.autograd.gradcheck(lambda m: mixed_attention(*args, attn_mask=m), mask)


@ways({"torch": Way(None)})
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


@ways({"torch": Way(None)} | BY_KERNEL)
def test_a_coefficient_s_gradient_loses_little_more_than_the_plain_formula_s(way) -> None:
    """A single head's, whose terms, of all queries and keys, nearly cancel; a running float32 sum loses 17 times."""
    errors = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        shapes = [(1, 1, 2048, 8), (1, 1, 77, 8), (1, 1, 77, 8), (1, 1)]
        drawn = [torch.randn(shape, generator=generator) for shape in shapes]
        weights = torch.randn(1, 1, 2048, 8, generator=generator)
        found = []
        for attention, dtype in (
            (mixed_attention, torch.float32),
            (mixed_attention_reference, torch.float32),
            (mixed_attention_reference, torch.float64),
        ):
            *inputs, coeff = (x.detach().to(dtype) for x in drawn)
            coeff.requires_grad_()
            (attention(*inputs, coeff) * weights).sum().backward()
            found.append(coeff.grad.item())
        errors.append([abs(x - found[2]) for x in found[:2]])
    ours, plain = torch.tensor(errors).norm(dim=0)
    assert ours <= 4 * plain


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


def test_autocast_gives_its_dtype_and_costs_no_precision_in_the_mixing() -> None:
    query, key, value, coeff = (x.detach().float() for x in inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mixed_attention(query, key, value, coeff)
    rounded = [x.bfloat16() for x in (query, key, value)]
    exact = naive_loop(*(x.double() for x in rounded), coeff.double())
    assert out.dtype == torch.bfloat16
    # half a unit in the last of bfloat16's 8 bits: the one rounding of the output
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backward_pass_within_autocast_is_the_one_without(dtype) -> None:
    *qkv, coeff = inputs(dtype)
    args = [*qkv, coeff.detach().float().requires_grad_()]
    expected = gradients(mixed_attention(*args), args)
    out = mixed_attention(*args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(out, args)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)  # the same operations on the same numbers


@pytest.mark.parametrize(
    ("heads", "tokens", "keys", "width", "value_width"),
    [
        (4, 13, 1, D, E),
        (4, 29, 77, 3, 1),
        (13, 31, 31, 8, 20),  # more heads than are mixed at once
        (2, 70, 130, 40, 40),  # several strips, several tiles; half a vector of width
        (5, 33, 26, 64, 136),
    ],
)
@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"scale": 0.3}, {"masked": True}, {"scale": -0.2, "masked": True}], ids=str
)
def test_ragged_sizes_with_all_gradients(way, heads, tokens, keys, width, value_width, options) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, tokens, heads, width), (B, keys, heads, width), (B, keys, heads, value_width)]
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64).transpose(1, 2) for shape in shapes]
    drawn.append(torch.randn(B, heads, heads, generator=generator, dtype=torch.float64))
    exact = [x.requires_grad_() for x in drawn]
    if "masked" in options:
        mask = torch.rand(B, 1, tokens, keys, generator=generator) > 0.5
        mask[0, 0, 3] = False  # a row without a key
        options = {**options, "attn_mask": mask}
        del options["masked"]
    args = [x.detach().to(way.dtype).requires_grad_() for x in exact]
    out, expected = mixed_attention(*args, **options), mixed_attention_reference(*exact, **options)
    assert_exact(out, expected)
    for one, other in zip(gradients(out, args), gradients(expected, exact)):
        # with one key every map is one: queries, keys have no gradient, and what rounding leaves is of float32's size
        assert_exact(one, other, least=float(keys == 1))


def test_gradient_checkpointing_double_use_and_inference_mode(way) -> None:
    args = inputs(way.dtype)
    plain = torch.autograd.grad(mixed_attention(*args).square().sum(), args)
    again = checkpoint(mixed_attention, *args, use_reentrant=False)
    loss = again.square().sum()
    torch.testing.assert_close(torch.autograd.grad(loss, args, retain_graph=True), plain)
    torch.testing.assert_close(torch.autograd.grad(loss, args), plain)
    twice = (mixed_attention(*args).square() + mixed_attention(*args).square()).sum()
    torch.testing.assert_close(torch.autograd.grad(twice, args), tuple(2 * gradient for gradient in plain))
    with torch.inference_mode():
        torch.testing.assert_close(mixed_attention(*args), again)
        torch.testing.assert_close(mixed_attention(*(x.detach().clone() for x in args)), again)


def test_inputs_and_gradients_of_any_strides(way) -> None:
    exact = inputs()
    out = mixed_attention_reference(*exact)
    expected = [out, *gradients(out, exact)]
    for order in ((0, 2, 1, 3), (3, 0, 1, 2), (0, 1, 3, 2)):
        back = [order.index(i) for i in range(4)]
        args = [x.detach().to(way.dtype).permute(order).contiguous().permute(back) for x in exact[:3]]
        args = [x.requires_grad_() for x in [*args, exact[3].detach().to(way.dtype).T.contiguous().T]]
        out = mixed_attention(*args)
        for one, other in zip([out, *gradients(out, args)], expected):
            assert_exact(one, other)
    even = torch.autograd.grad(mixed_attention(*args).sum(), args)  # whose gradient is one number, expanded
    for one, other in zip(even, torch.autograd.grad(mixed_attention_reference(*exact).sum(), exact)):
        assert_exact(one, other, least=1.0)
    key = args[1].detach()[:, :1].expand(-1, H, -1, -1)
    assert_exact(mixed_attention(args[0], key, *args[2:]), mixed_attention_reference(args[0], key, *args[2:]))


def test_another_default_device_changes_nothing(way) -> None:
    args = inputs(way.dtype)
    out = mixed_attention(*args)
    expected = [out, *gradients(out, args)]
    with torch.device("meta"):
        out = mixed_attention(*args)
        found = torch.autograd.grad(out.sum(), args)
    torch.testing.assert_close(out, expected[0], rtol=0, atol=0)
    assert all(gradient.device.type == "cpu" for gradient in found)


def test_the_output_lies_in_memory_as_models_read_it(way) -> None:
    out = mixed_attention(*inputs(way.dtype))
    assert out.transpose(1, 2).is_contiguous()


def test_gradients_are_the_same_bits_every_time(way) -> None:
    args = [*(torch.randn(1, H, 64, 8).to(way.dtype).requires_grad_() for _ in range(3)), inputs(way.dtype)[3]]
    first = gradients(mixed_attention(*args), args)
    for _ in range(5):
        torch.testing.assert_close(gradients(mixed_attention(*args), args), first, rtol=0, atol=0)


def test_callers_at_the_same_time_each_get_their_own_answer(way) -> None:
    def attend(tokens: int) -> Tensor:
        torch.set_num_threads(way.threads)
        generator = torch.Generator().manual_seed(tokens)
        qkv = [torch.randn(1, H, tokens, D, generator=generator).to(way.dtype) for _ in range(3)]
        return mixed_attention(*qkv, torch.eye(H, dtype=way.dtype).roll(1, 0))

    expected = {tokens: attend(tokens) for tokens in range(20, 24)}
    answers: dict[int, list[Tensor]] = {tokens: [] for tokens in expected}
    callers = [
        threading.Thread(target=lambda tokens=tokens: answers[tokens].extend(attend(tokens) for _ in range(10)))
        for tokens in expected
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
        assert not caller.is_alive()
    for tokens, found in answers.items():
        assert len(found) == 10
        for answer in found:
            torch.testing.assert_close(answer, expected[tokens], rtol=0, atol=0)


class _Attended(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Tensor:
        return mixed_attention(*inputs(torch.float32, requires_grad=False))


def test_workers_of_a_data_loader_compute_it() -> None:
    """Forked from a process whose threads have computed it; torch gives workers one thread each."""
    expected = _Attended()[0]
    (found,) = torch.utils.data.DataLoader(_Attended(), num_workers=1, timeout=60)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=0)


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


def test_heads_without_width_have_even_maps(way) -> None:
    """As in SDPA: every score is a sum of nothing."""
    args = [torch.randn(B, H, T, 0, requires_grad=True), torch.randn(B, H, S, 0), torch.randn(B, H, S, E)]
    out = mixed_attention(*args, torch.zeros(H, H))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*args))
    torch.testing.assert_close(out, mixed_attention_reference(*args, torch.zeros(H, H)))
    out.sum().backward()
    assert args[0].grad is not None


@ways({"AVX2": Way("AVX2"), "AVX-512": Way("AVX512")})
def test_views_that_begin_between_two_numbers_are_copied_for_the_kernel(way, monkeypatch) -> None:
    if cpu.instruction_set() is None:
        pytest.skip("the kernel was not built")

    def odd(x: Tensor) -> Tensor:
        data = bytearray(b"x" + x.detach().numpy().tobytes())
        return torch.frombuffer(data, dtype=x.dtype, offset=1).view(x.shape)

    given = [*inputs(torch.float32, requires_grad=False), torch.randn(1, 1, T, S)]
    expected = mixed_attention(*given)
    pointer, addresses = cpu._Inputs.pointer, []
    monkeypatch.setattr(cpu._Inputs, "pointer", lambda self, x: addresses.append(x.data_ptr()) or pointer(self, x))
    query, *others = map(odd, given)
    out = mixed_attention(query.requires_grad_(), *others)
    torch.testing.assert_close(out.detach(), expected, rtol=0, atol=0)
    out.backward(odd(torch.ones_like(out)))
    assert len(addresses) > 10
    assert not any(address % 4 for address in addresses)


@ways(BY_KERNEL)
def test_a_library_that_was_built_before_its_source_was_changed_is_not_called(monkeypatch, way, tmp_path) -> None:
    changed = tmp_path / "kernel.h"
    changed.write_bytes(cpu._SOURCE.read_bytes() + b" ")
    monkeypatch.setattr(cpu, "_SOURCE", changed)
    with pytest.raises(
        ImportError, match="was built from another kernel.h .*: install the package once more, or delete"
    ):
        cpu._load(way.instructions)
    monkeypatch.setattr(cpu, "_SOURCE", tmp_path / "not in a wheel")
    assert cpu._load(way.instructions) is not None


@ways({"AVX2": Way("AVX2"), "torch": Way(None)})
def test_float64_and_other_dtypes_are_not_the_kernel_s(way) -> None:
    assert not cpu.takes(*inputs()[:3])
    assert cpu.takes(*inputs(torch.bfloat16)[:3]) == (way.instructions is not None)
    assert cpu.instruction_set() == (BEST if way.instructions else None)


def _shapes(query=(B, H, T, D), key=(B, H, S, D), value=(B, H, S, E), coeff=(H, H), **options):
    tensors = [torch.zeros(shape) for shape in (query, key, value, coeff)]
    return tensors, {name: torch.zeros(x) if isinstance(x, tuple) else x for name, x in options.items()}


@ways({"torch": Way(None)})
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
        ({"attn_mask": torch.ones(T, S, device="meta")}, "query is on cpu and attn_mask on meta: move them to one"),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_named(wrong, message) -> None:
    tensors, options = _shapes(**wrong)
    with pytest.raises(ValueError, match=message):
        mixed_attention(*tensors, **options)


def test_compiles_into_one_graph_once_for_all_coefficients(way) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(mixed_attention, backend=counter, fullgraph=True)
    for scale in (1.0, 0.0, -2.0):
        *qkv, coeff = inputs(way.dtype)
        coeff = (coeff * scale).detach().requires_grad_()
        out = compiled(*qkv, coeff)
        torch.testing.assert_close(out, mixed_attention(*qkv, coeff))
        (grad,) = torch.autograd.grad(out.square().sum(), coeff)
        torch.testing.assert_close(grad, torch.autograd.grad(mixed_attention(*qkv, coeff).square().sum(), coeff)[0])
    assert counter.frame_count == 1


@ways({name: WAYS[name] for name in ("torch, ragged blocks", "AVX-512", "AVX2, two threads")})
@pytest.mark.parametrize(("masked", "per_sample"), [(True, True), (False, False)])
def test_the_operators_keep_what_they_register(way, masked, per_sample) -> None:
    *qkv, coeff = inputs(way.dtype, per_sample)
    views = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in qkv]
    mask = torch.zeros(1, 1, T, S, dtype=way.dtype) if masked else None
    operators = torch.ops.coeff_diffusers
    torch.library.opcheck(operators.mixed_attention, (*views, coeff, mask, False, 0.5))
    args = [x.detach() for x in (*views, coeff)]
    out, statistics = operators.mixed_attention(*args, mask, False, 0.5)
    for wanted in ([True] * 4, [False, True, False, False], [True, False, True, False], [False, False, False, True]):
        torch.library.opcheck(
            operators.mixed_attention_backward, (torch.ones_like(out), *args, mask, statistics, False, 0.5, wanted)
        )


def test_what_was_compiled_without_the_kernel_is_right_with_it(monkeypatch) -> None:
    """Compilers keep what they made on the disk, and know nothing of the kernel."""
    args = inputs(torch.float32)
    fake = torch._subclasses.FakeTensorMode()
    shapes = []
    for library in (cpu._library(), None):
        monkeypatch.setattr(cpu, "_library", lambda library=library: library)
        real = torch.ops.coeff_diffusers.mixed_attention(*args, None, False, 0.5)
        with fake:
            planned = torch.ops.coeff_diffusers.mixed_attention(*map(fake.from_tensor, args), None, False, 0.5)
        shapes += [[(x.shape, x.stride()) for x in outputs] for outputs in (real, planned)]
    assert all(found == shapes[0] for found in shapes)


def test_forward_mode_differentiation_is_the_reference_s(way) -> None:
    args = tuple(inputs(way.dtype, requires_grad=False))
    tangents = tuple(torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x) for x in args)
    (out, tangent), (expected, expected_tangent) = (
        torch.func.jvp(attention, args, tangents) for attention in (mixed_attention, mixed_attention_reference)
    )
    assert_exact(out, expected)
    assert_exact(tangent, expected_tangent)
    assert tangent.abs().max() > 0.1


def test_a_second_derivative_is_refused(way) -> None:
    args = inputs(way.dtype)
    (gradient,) = torch.autograd.grad(mixed_attention(*args).square().sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def test_coefficients_that_need_no_gradient_cost_none(monkeypatch, way) -> None:
    query, key, value, coeff = inputs(way.dtype)
    wanted = []
    backward = functional._blockwise_backward
    monkeypatch.setattr(functional, "_blockwise_backward", lambda *args: wanted.append(args[-1]) or backward(*args))
    mixed_attention(query, key, value, coeff.detach()).sum().backward()
    assert wanted == [[True, True, True, False]]
    with torch.no_grad():
        assert not mixed_attention(query, key, value, coeff).requires_grad
