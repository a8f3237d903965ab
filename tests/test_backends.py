"""What chooses among the ways to compute mixed attention, and what happens where a GPU's kernels cannot be used."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from coeff_diffusers import backends, get_mixing_backend, mixed_attention, set_mixing_backend
from coeff_diffusers.backends import cpu, gpu, loop, tiles
from coeff_diffusers.functional import mixed_attention_reference

BF16, FP16 = torch.bfloat16, torch.float16
B, H, T, S, D = 2, 3, 21, 37, 24


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    set_mixing_backend("auto")
    gpu._failures.clear()
    gpu._checked.clear()


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU whose kernels are torch's loop, to see what is decided around them. What they were called for."""
    calls: list[str] = []

    def runs(name: str):  # type: ignore[no-untyped-def]
        def run(*args):  # type: ignore[no-untyped-def]
            calls.append(name)
            return getattr(loop, name)(*args)

        return run

    for name in ("forward", "backward"):
        monkeypatch.setattr(gpu, name, runs(name))
    monkeypatch.setattr(gpu, "_is_gpu", lambda device: True)
    monkeypatch.setattr(cpu, "takes", lambda *args: False)
    monkeypatch.setattr(gpu, "_name", lambda device: "Card 9000")
    monkeypatch.setattr(gpu, "_has_matrix_units", lambda device: True)
    monkeypatch.setattr(gpu, "is_installed", lambda: True)
    monkeypatch.setattr(gpu, "triton_version", lambda: "3.7")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return calls


def inputs(dtype: torch.dtype = BF16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    qkv = [torch.randn(B, n, H, D, generator=generator).to(dtype).transpose(1, 2) for n in (T, S, S)]
    return [x.requires_grad_() for x in (*qkv, 0.3 * torch.randn(H, H, generator=generator))]


def test_the_way_can_be_chosen_and_asked_for() -> None:
    usual = get_mixing_backend()
    assert usual == ("cpu" if cpu.instruction_set() else "torch")
    assert get_mixing_backend(dtype=torch.float64) == "torch"
    set_mixing_backend("torch")
    assert get_mixing_backend() == "torch"
    set_mixing_backend("auto")
    assert get_mixing_backend() == usual


def test_every_way_gives_the_same(monkeypatch) -> None:
    args = inputs(torch.float32)
    expected = mixed_attention_reference(*args)
    for name in ("auto", "torch", *(["cpu"] if cpu.instruction_set() else [])):
        set_mixing_backend(name)
        torch.testing.assert_close(mixed_attention(*args), expected, rtol=1e-5, atol=1e-5)  # float32's rounding


def test_what_cannot_be_chosen_says_why(monkeypatch) -> None:
    with pytest.raises(ValueError, match="no backend 'cuda'; there are 'auto', 'cpu', 'triton' and 'torch'"):
        set_mixing_backend("cuda")
    monkeypatch.setattr(gpu, "is_installed", lambda: False)
    with pytest.raises(
        ValueError, match="triton is not installed; .* triton-windows .*; 'auto' or 'torch' work without"
    ):
        set_mixing_backend("triton")
    monkeypatch.setattr(cpu, "_library", lambda: None)
    with pytest.raises(ValueError, match="no compiled kernel for this CPU is installed .* 'torch' work without"):
        set_mixing_backend("cpu")
    assert get_mixing_backend() == "torch"


def test_the_environment_chooses_too() -> None:
    code = "import coeff_diffusers; print(coeff_diffusers.get_mixing_backend())"

    def run(name: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "COEFF_DIFFUSERS_BACKEND": name}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    assert run("torch").stdout == "torch\n"
    assert "COEFF_DIFFUSERS_BACKEND: there is no backend 'cuda'" in run("cuda").stderr


def test_a_card_serves_sixteen_bits_within_what_the_table_holds(card) -> None:
    assert get_mixing_backend(dtype=BF16) == get_mixing_backend(dtype=FP16, heads=64, width=256) == "triton"
    set_mixing_backend("triton")
    for options in ({"dtype": torch.float32}, {"dtype": BF16, "heads": 65}, {"dtype": BF16, "width": 257}):
        assert get_mixing_backend(**options) == "torch"


def test_an_unknown_card_checks_itself_once_for_each_dtype(monkeypatch, card, caplog) -> None:
    monkeypatch.setattr(tiles, "MEASURED", frozenset())
    for _ in range(2):
        args = inputs()
        mixed_attention(*args).sum().backward()
    assert card == ["forward", "backward"] * 3  # of the check, and of two calls
    mixed_attention(*inputs(FP16))
    assert card[6:] == ["forward", "backward", "forward"]
    assert not caplog.records


def test_a_card_with_a_result_of_this_triton_is_not_checked(monkeypatch, card) -> None:
    monkeypatch.setattr(tiles, "MEASURED", frozenset({("Card 9000", "3.6")}))
    mixed_attention(*inputs())
    assert card == ["forward", "backward", "forward"]
    gpu._checked.clear()
    monkeypatch.setattr(tiles, "MEASURED", frozenset({("Card 9000", "3.7")}))
    mixed_attention(*inputs())
    assert card[3:] == ["forward"]


def test_a_wrong_kernel_is_told_once_and_not_used(monkeypatch, card, caplog) -> None:
    wrong = gpu.backward
    monkeypatch.setattr(gpu, "backward", lambda *args: tuple(1.1 * x for x in wrong(*args)))
    for _ in range(2):
        args = inputs()
        out = mixed_attention(*args)
        (gradient,) = torch.autograd.grad(out.sum(), args[3])
    set_mixing_backend("torch")
    expected = torch.autograd.grad(mixed_attention(*args).sum(), args[3])[0]
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0)
    assert card == ["forward", "backward"]  # of the check alone
    (record,) = caplog.records
    assert "the Triton kernels compute something else on Card 9000 in torch.bfloat16" in record.message
    assert "are 0.0e+00, 1.0e-01, 1.0e-01, 1.0e-01, 1.0e-01, where 0.02 is expected" in record.message


def test_a_kernel_that_does_not_compile_is_told_once_and_the_loop_takes_over(monkeypatch, card, caplog) -> None:
    monkeypatch.setattr(tiles, "MEASURED", frozenset({("Card 9000", "3.7")}))
    for failing in ("forward", "backward"):
        with monkeypatch.context() as patch:
            patch.setattr(gpu, failing, lambda *args: (_ for _ in ()).throw(RuntimeError("PTX: no such instruction")))
            gpu._failures.clear()
            caplog.clear()
            for _ in range(2):
                args = inputs()
                found = torch.autograd.grad(mixed_attention(*args).sum(), args)
            set_mixing_backend("torch")
            expected = torch.autograd.grad(mixed_attention(*args).sum(), args)
            set_mixing_backend("auto")
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
            (record,) = caplog.records
            assert record.levelno == logging.WARNING
            assert "for attention of 3 heads of width 24 in torch.bfloat16 cannot run on Card 9000" in record.message
            assert "PTX: no such instruction" in record.message
            assert get_mixing_backend(dtype=BF16, heads=3, width=24) == "torch"
            assert get_mixing_backend(dtype=BF16, heads=4, width=24) == "triton"


def test_no_memory_is_no_reason_to_take_another_way(monkeypatch, card) -> None:
    monkeypatch.setattr(tiles, "MEASURED", frozenset({("Card 9000", "3.7")}))

    def no_memory(*args):  # type: ignore[no-untyped-def]
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu, "forward", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        mixed_attention(*inputs())
    monkeypatch.setattr(
        gpu, "forward", lambda *args: (_ for _ in ()).throw(RuntimeError("Triton Error: out of memory"))
    )
    with pytest.raises(RuntimeError, match="out of memory"):
        mixed_attention(*inputs())
    assert not gpu._failures


def test_within_the_capture_of_a_graph_nothing_is_checked(monkeypatch, card, caplog) -> None:
    """Checking waits for the device, which a capture does not allow. What was checked before is used."""
    monkeypatch.setattr(tiles, "MEASURED", frozenset())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    gpu._not_while_capturing.cache_clear()
    mixed_attention(*inputs())
    mixed_attention(*inputs())
    assert not card
    assert [record.message.count("Call the model once before capturing it") for record in caplog.records] == [1]
    gpu._checked[torch.device("cpu"), BF16] = True
    mixed_attention(*inputs())
    assert card == ["forward"]


def test_gradients_of_another_way_than_the_forward_pass_s_are_not_finite() -> None:
    if cpu.instruction_set() is None:
        pytest.skip("there is one way alone")
    args = inputs(torch.float32)
    set_mixing_backend("torch")
    out = mixed_attention(*args)
    set_mixing_backend("cpu")
    assert not any(gradient.isfinite().all() for gradient in torch.autograd.grad(out.sum(), args))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("size", [0.1, 30.0])
def test_torch_s_loop_in_sixteen_bits_loses_no_more_than_twice_what_sdpa_loses(
    monkeypatch, dtype, masked, size
) -> None:
    """As on an accelerator: products of 16-bit operands, in float32. Against float64, the output and each gradient."""
    monkeypatch.setattr(loop, "_multiplies_narrow", lambda query: True)
    monkeypatch.setattr(loop, "_narrow_product", lambda left, right: left.float() @ right.float())
    monkeypatch.setattr(loop, "_BLOCK_ENTRIES_CPU", 500)
    set_mixing_backend("torch")
    *narrow, coeff = inputs(dtype)
    coeff = (size * coeff).detach().requires_grad_()
    mask = torch.rand(B, 1, T, S, generator=torch.Generator().manual_seed(1)) > 0.3 if masked else None
    weights = torch.randn(B, H, T, D, generator=torch.Generator().manual_seed(2)).to(dtype)

    def all_of(call, *args: Tensor) -> list[Tensor]:  # type: ignore[no-untyped-def]
        out = call(*args, mask)
        return [out, *torch.autograd.grad(out, args, weights.to(out.dtype))]

    def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
        return [((x.double() - y).norm() / y.norm()).item() for x, y in zip(found, exact)]

    wide = [x.detach().double().requires_grad_() for x in (*narrow, coeff)]
    ours = errors(all_of(mixed_attention, *narrow, coeff), all_of(mixed_attention_reference, *wide))
    sdpa = errors(all_of(F.scaled_dot_product_attention, *narrow), all_of(F.scaled_dot_product_attention, *wide[:3]))
    rounding = (
        torch.finfo(dtype).eps / 2
    )  # SDPA's kernels for CPUs keep small maps in float32, and lose less than that
    assert all(error <= 2 * max(own, rounding) for error, own in zip(ours, [*sdpa, sdpa[3]])), (ours, sdpa)


def test_the_table_of_tiles_names_the_cards_that_have_a_result() -> None:
    results = Path(__file__).parent.parent / "examples" / "benchmarks" / "results"
    found = [json.loads(path.read_text()) for path in results.glob("*.json")]
    assert {(result["card"], ".".join(result["triton"].split(".")[:2])) for result in found} == tiles.MEASURED


def test_every_backend_is_in_the_module_s_table() -> None:
    assert all(f"| {name} |" in backends.__doc__ for name in backends._WAYS)
