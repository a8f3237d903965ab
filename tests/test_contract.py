"""What every host keeps to: zero is the base, all coefficients learn, off and on, saved and loaded, taken off."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from diffusers.utils.peft_utils import set_adapter_layers
from hosts import Host, randomise
from packaging.version import Version
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from coeff_diffusers import (
    CoeffAttnProcessor,
    CoeffConfig,
    add_coeff_adapter,
    coeff_disabled,
    coeff_parameters,
    load_coeff_weights,
    save_coeff_weights,
    set_coeff_adapters,
    unload_coeff_weights,
)
from coeff_diffusers.layers import attention_kind, attention_layers

LORA = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights="gaussian")


@pytest.fixture
def base(host: Host, model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return host.run(model)


@torch.no_grad()
def run(host: Host, model: nn.Module) -> torch.Tensor:
    return host.run(model)


def test_every_attention_layer_gets_coefficients(host, model) -> None:
    add_coeff_adapter(model)
    parameters = coeff_parameters(model)
    assert len(parameters) == host.layers
    assert sum(parameter.numel() for parameter in parameters) == host.coefficients


def test_kinds_are_told_apart(host, model) -> None:
    assert {attention_kind(path, layer) for path, layer in attention_layers(model).items()} == host.kinds


def test_zero_delta_is_the_base(host, model, base) -> None:
    add_coeff_adapter(model)
    # another order of float32 sums; these models amplify by their large weights
    torch.testing.assert_close(run(host, model), base, rtol=1e-4, atol=1e-4)


def test_random_delta_is_not_the_base(host, model, base) -> None:
    add_coeff_adapter(model)
    randomise(model)
    assert (run(host, model) - base).norm() > 1e-2 * base.norm()


def test_each_coefficient_gets_a_finite_gradient_and_nothing_else_moves(host, model) -> None:
    model.requires_grad_(False)
    add_coeff_adapter(model)
    randomise(model)
    frozen = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(coeff_parameters(model), lr=1e-3)
    model.train()
    host.run(model).square().mean().backward()
    for parameter in coeff_parameters(model):
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.ne(0).all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None, name
    before = [parameter.detach().clone() for parameter in coeff_parameters(model)]
    optimizer.step()
    assert all((new != old).any() for new, old in zip(coeff_parameters(model), before))
    torch.testing.assert_close(model.state_dict(), frozen, rtol=0, atol=0)


def test_gradients_are_the_same_under_gradient_checkpointing(host, model) -> None:
    model.requires_grad_(False)
    add_coeff_adapter(model)
    randomise(model)
    model.train()
    host.run(model).square().mean().backward()
    plain = [parameter.grad.clone() for parameter in coeff_parameters(model)]
    for parameter in coeff_parameters(model):
        parameter.grad = None
    model.enable_gradient_checkpointing()
    host.run(model).square().mean().backward()
    # the same operations are run again on the same numbers
    torch.testing.assert_close([p.grad for p in coeff_parameters(model)], plain, rtol=0, atol=0)


def test_disabled_and_weight_zero_are_the_base_bit_for_bit(host, model, base) -> None:
    add_coeff_adapter(model)
    randomise(model)
    mixed = run(host, model)
    with coeff_disabled(model):
        torch.testing.assert_close(run(host, model), base, rtol=0, atol=0)
    torch.testing.assert_close(run(host, model), mixed, rtol=0, atol=0)
    set_coeff_adapters(model, "default", 0.0)
    torch.testing.assert_close(run(host, model), base, rtol=0, atol=0)
    set_coeff_adapters(model, "default", 1.0)
    torch.testing.assert_close(run(host, model), mixed, rtol=0, atol=0)


def test_weight_scales_delta(host, model) -> None:
    add_coeff_adapter(model)
    randomise(model)
    set_coeff_adapters(model, "default", -1.5)
    weighted = run(host, model)
    with torch.no_grad():
        for parameter in coeff_parameters(model):
            parameter.mul_(-1.5)
    set_coeff_adapters(model, "default", 1.0)
    torch.testing.assert_close(weighted, run(host, model), rtol=1e-4, atol=1e-4)  # one rounding of Delta


def test_saved_and_loaded_is_equal(host, model, base, tmp_path) -> None:
    fresh = copy.deepcopy(model)
    add_coeff_adapter(model)
    randomise(model)
    save_coeff_weights(model, tmp_path)
    load_coeff_weights(fresh, tmp_path)
    out = run(host, fresh)
    torch.testing.assert_close(out, run(host, model), rtol=0, atol=0)
    assert (out - base).norm() > 1e-2 * base.norm()


def test_unload_gives_back_the_base_and_the_same_objects(host, model, base) -> None:
    processors = [layer.processor for layer in attention_layers(model).values()]
    keys = list(model.state_dict())
    names = [name for name, _ in model.named_parameters()]
    add_coeff_adapter(model)
    randomise(model)
    assert list(model.state_dict()) == keys
    unload_coeff_weights(model)
    after = [layer.processor for layer in attention_layers(model).values()]
    assert all(one is other for one, other in zip(after, processors, strict=True))
    assert [name for name, _ in model.named_parameters()] == names
    torch.testing.assert_close(run(host, model), base, rtol=0, atol=0)


@pytest.mark.parametrize("lora_first", [True, False])
def test_with_lora_in_both_orders(host, model, base, lora_first) -> None:
    model.requires_grad_(False)
    torch.manual_seed(1)
    for step in ("lora", "coeff") if lora_first else ("coeff", "lora"):
        if step == "lora":
            inject_adapter_in_model(LORA, model)  # as add_adapter does, which PixArt has not
        else:
            add_coeff_adapter(model)
            randomise(model)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=generator)
    both = run(host, model)
    with coeff_disabled(model):
        lora_alone = run(host, model)
    set_adapter_layers(model, enabled=False)
    coeff_alone = run(host, model)
    set_adapter_layers(model, enabled=True)
    for one, other in [(both, lora_alone), (both, coeff_alone), (lora_alone, base), (coeff_alone, base)]:
        assert (one - other).norm() > 1e-2 * base.norm()
    unload_coeff_weights(model)
    torch.testing.assert_close(run(host, model), lora_alone, rtol=0, atol=0)


def test_delta_stays_float32_when_the_model_is_cast(host, model) -> None:
    add_coeff_adapter(model)
    randomise(model)
    before = [parameter.detach().clone() for parameter in coeff_parameters(model)]
    model.to(torch.bfloat16)
    assert next(model.parameters()).dtype == torch.bfloat16
    torch.testing.assert_close([p.detach() for p in coeff_parameters(model)], before, rtol=0, atol=0)


def test_wrapper_presents_the_wrapped_signature_and_coeff_scale(model) -> None:
    wrapped = {path: layer.processor for path, layer in attention_layers(model).items()}
    add_coeff_adapter(model)
    for path, layer in attention_layers(copy.deepcopy(model)).items():
        assert isinstance(layer.processor, CoeffAttnProcessor)
        shown = inspect.signature(layer.processor.__call__)
        own = [parameter for name, parameter in shown.parameters.items() if name not in ("coeff", "coeff_scale")]
        assert shown.replace(parameters=own) == inspect.signature(wrapped[path].__call__)
        for name in ("coeff", "coeff_scale"):
            assert shown.parameters[name].kind is inspect.Parameter.KEYWORD_ONLY


def test_chosen_kind_alone_is_wrapped(host, model) -> None:
    for kind in host.kinds:
        add_coeff_adapter(model, CoeffConfig(kinds=(kind,)), adapter_name=kind)
    for path, layer in attention_layers(model).items():
        assert list(layer.processor.coeff) == [attention_kind(path, layer)]


@pytest.mark.slow
@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_is_eager(host, model, fullgraph, request) -> None:
    """aot_eager traces as inductor does. Before torch 2.14 a function mode over FLUX's unflatten cannot be traced."""
    if fullgraph and "flux" in request.node.name and Version(torch.__version__) < Version("2.14"):
        pytest.skip("torch < 2.14 refuses a whole graph of FLUX, loudly")
    add_coeff_adapter(model)
    randomise(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    torch.testing.assert_close(run(host, compiled), run(host, model), rtol=1e-4, atol=1e-4)  # other sums


def test_a_pipeline_s_autocast_keeps_coefficients_effective(host, model) -> None:
    add_coeff_adapter(model)
    randomise(model)
    exact = run(host, model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = run(host, model)
    with coeff_disabled(model):
        base = run(host, model)
    assert (rounded.float() - exact).norm() < 0.5 * (exact - base).norm()
