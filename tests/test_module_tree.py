"""Coefficients are outside of the host's module tree, and nothing that walks it finds, moves, casts or loses them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, dispatch_model
from accelerate.hooks import remove_hook_from_module
from diffusers import MotionAdapter, SD3Transformer2DModel, UNetMotionModel
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0, JointAttnProcessor2_0
from diffusers.training_utils import EMAModel
from hosts import HOSTS, randomise, visible
from test_host_api import load_ip_adapter, problems, run_with_image
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from coeff_diffusers import (
    CoeffAttnProcessor,
    add_coeff_adapter,
    coeff_adapters,
    coeff_disabled,
    coeff_parameters,
    coeff_per_sample,
    load_coeff_weights,
    save_coeff_weights,
    set_coeff_adapters,
)
from coeff_diffusers.adapters import layer_coefficients
from coeff_diffusers.coefficients import LayerCoefficients
from coeff_diffusers.layers import attention_layers
from coeff_diffusers.record import ModelRecord, known_record

CPU = torch.device("cpu")
Call = Callable[[nn.Module], torch.Tensor]


def tree(model: nn.Module) -> list[list[str]]:
    walks = model.named_modules(), model.named_parameters(), model.named_buffers(), model.state_dict().items()
    return [[name for name, _ in walk] for walk in walks]


def tuned(model: nn.Module) -> nn.Module:
    add_coeff_adapter(model)
    randomise(model)
    return model


@pytest.fixture
def run(host) -> Call:
    def run(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return host.run(model)

    return run


def test_no_walk_finds_them(host, model) -> None:
    before = tree(model)
    tuned(model)
    assert tree(model) == before
    model.requires_grad_(False)
    assert all(parameter.requires_grad for parameter in coeff_parameters(model))


def test_a_wrapper_is_a_module_where_the_wrapped_processor_is_one_under_its_names(unet) -> None:
    load_ip_adapter(unet)
    before = tree(unet)
    base = run_with_image(unet)
    tuned(unet)
    assert tree(unet) == before
    modules = [isinstance(processor, nn.Module) for processor in unet.attn_processors.values()]
    assert modules == [path.endswith("attn2.processor") for path in unet.attn_processors]
    out = run_with_image(unet)
    for twin in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        torch.testing.assert_close(run_with_image(twin), out, rtol=0, atol=0)
        randomise(twin, seed=3)
        assert (run_with_image(twin) != out).any()
    torch.testing.assert_close(run_with_image(unet), out, rtol=0, atol=0)
    with coeff_disabled(unet):
        torch.testing.assert_close(run_with_image(unet), base, rtol=0, atol=0)


def test_attributes_are_the_wrapped_processors_to_read_set_and_delete() -> None:
    for processor in (AttnProcessor2_0(), IPAdapterAttnProcessor2_0(8, 6)):
        wrapper = CoeffAttnProcessor(2, processor)
        wrapper.note = "new"
        assert processor.note == wrapper.note == "new"
        del wrapper.note
        assert not hasattr(processor, "note")
        assert not hasattr(wrapper, "note")
    wrapper.scale = [0.25]
    assert (processor.scale, wrapper.hidden_size, wrapper.cross_attention_dim, wrapper.num_tokens) == (
        [0.25],
        8,
        6,
        (4,),
    )
    assert wrapper.train(False).training is processor.training is False
    assert wrapper.to_k_ip is processor.to_k_ip


def leaf_level(model: nn.Module, folder) -> None:
    model.enable_group_offload(CPU, CPU, offload_type="leaf_level", offload_to_disk_path=str(folder))


def block_level(model: nn.Module, folder) -> None:
    model.enable_group_offload(
        CPU, CPU, offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=str(folder)
    )


def check_offloaded(model: nn.Module, run: Call, expected: torch.Tensor, values: list[torch.Tensor], tmp_path) -> None:
    """Whatever was offloaded, the images are right, and so are the file, each sample's own, and a hot swap."""
    torch.testing.assert_close(run(model), expected, rtol=0, atol=0)
    torch.testing.assert_close([p.detach() for p in coeff_parameters(model)], values, rtol=0, atol=0)
    file = save_coeff_weights(model, tmp_path / "file")
    with coeff_per_sample(model, ["default", "default"]):
        torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-4)  # a matrix for each sample
    with torch.no_grad():
        for parameter in coeff_parameters(model):
            parameter.zero_()
    load_coeff_weights(model, file, hotswap=True)
    torch.testing.assert_close(run(model), expected, rtol=0, atol=0)
    assert problems(model) == []


@pytest.mark.parametrize("offload", [leaf_level, block_level])
@pytest.mark.parametrize("attached_first", [True, False])
def test_group_offload_to_disk(model, run, offload, attached_first, tmp_path) -> None:
    twin = tuned(copy.deepcopy(model))
    if attached_first:
        tuned(model)
    offload(model, tmp_path)
    if not attached_first:
        tuned(model)
    values = [parameter.detach().clone() for parameter in coeff_parameters(twin)]
    check_offloaded(model, run, run(twin), values, tmp_path)


OFFLOADS = {
    "leaf": leaf_level,
    "block": block_level,
    "sequential": lambda model, _: cpu_offload(model, execution_device=CPU),
    "model": lambda model, _: cpu_offload_with_hook(model, execution_device=CPU),
    "device map": lambda model, folder: dispatch_model(
        model,
        {name: "disk" if name == "mid_block" else "cpu" for name, _ in model.named_children()},
        main_device="cpu",
        offload_dir=folder,
        force_hooks=True,
    ),
}


@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)
@pytest.mark.parametrize("attached_first", [True, False])
def test_offloading_of_an_ip_adapter_under_coefficients(unet, offload, attached_first, tmp_path) -> None:
    load_ip_adapter(unet)
    twin = tuned(copy.deepcopy(unet))
    expected = run_with_image(twin)
    if attached_first:
        tuned(unet)
    offload(unet, tmp_path)
    if not attached_first:
        tuned(unet)
    torch.testing.assert_close(run_with_image(unet), expected, rtol=0, atol=0)
    if offload is OFFLOADS["sequential"]:
        remove_hook_from_module(unet, recurse=True)
        torch.testing.assert_close(run_with_image(unet), expected, rtol=0, atol=0)


def test_a_moving_average_of_the_model_s_parameters(unet, tmp_path) -> None:
    tuned(unet)
    values = [parameter.detach().clone() for parameter in coeff_parameters(unet)]
    ema = EMAModel(unet.parameters(), model_cls=type(unet), model_config=unet.config)
    ema.step(unet.parameters())
    ema.store(unet.parameters())
    ema.copy_to(unet.parameters())
    ema.restore(unet.parameters())
    ema.save_pretrained(tmp_path)
    torch.testing.assert_close([p.detach() for p in coeff_parameters(unet)], values, rtol=0, atol=0)


def test_a_motion_model_is_built_of_a_unet_with_an_ip_adapter(unet) -> None:
    load_ip_adapter(unet)
    tuned(unet)
    adapter = MotionAdapter(block_out_channels=(32, 64), motion_layers_per_block=1, motion_num_attention_heads=2)
    built = UNetMotionModel.from_unet2d(unet, adapter)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor"
    assert torch.equal(built.attn_processors[name].to_k_ip[0].weight, unet.attn_processors[name].to_k_ip[0].weight)


def test_wrapped_blocks_are_the_blocks_they_wrap(unet) -> None:
    """As checkpointing of activations wraps them, and torch.compile of one block."""
    tuned(unet)
    with torch.no_grad():
        expected = HOSTS["unet"].run(unet)
    apply_activation_checkpointing(unet, check_fn=lambda module: module is unet.mid_block)
    with torch.no_grad():
        torch.testing.assert_close(HOSTS["unet"].run(unet), expected, rtol=0, atol=0)
    assert "_checkpoint_wrapped_module" in dict(unet.mid_block.named_children())


def test_adapters_made_in_inference_mode_are_like_others(unet, tmp_path) -> None:
    file = save_coeff_weights(tuned(copy.deepcopy(unet)), tmp_path)
    with torch.inference_mode():
        load_coeff_weights(unet, file)
        add_coeff_adapter(unet, adapter_name="new")
        out = HOSTS["unet"].run(unet)
    assert problems(unet) == [
        "problem: adapter 'default' is not active, or active with weight 0: see set_coeff_adapters"
    ]
    load_coeff_weights(unet, file, hotswap=True)
    assert out.is_inference()
    parameters = coeff_parameters(unet)
    with coeff_adapters(unet, ["default", "new"]):
        HOSTS["unet"].run(unet).square().mean().backward()
    assert all(parameter.grad is not None for parameter in parameters)


# Devices. There is one here: another is asked for in its place.


def test_delta_goes_where_it_is_first_asked_for_and_stays_once_it_has_been_in_a_graph(monkeypatch) -> None:
    moved: list[torch.device] = []
    monkeypatch.setattr(LayerCoefficients, "move", lambda self, device: moved.append(device))
    coefficients = CoeffAttnProcessor(2).coefficients
    parameter = coefficients.coeff["default"]
    with torch.no_grad():
        assert coefficients.on("default", CPU) is parameter
        assert coefficients.on("default", torch.device("meta")) is parameter
    assert moved == [torch.device("meta")]
    assert coefficients.on("default", CPU) is parameter  # now it trains
    other = coefficients.on("default", torch.device("meta"))
    assert other.device.type == "meta"
    assert other.requires_grad
    assert parameter.device == CPU
    assert len(moved) == 1


def test_layers_say_where_they_compute(unet, monkeypatch) -> None:
    asked: list[torch.device | None] = []
    delta = LayerCoefficients.delta

    def noted(self, training=False, device=None):
        asked.append(device)
        return delta(self, training, device)

    monkeypatch.setattr(LayerCoefficients, "delta", noted)
    tuned(unet)
    HOSTS["unet"].run(unet)
    assert asked == [CPU] * 8


def test_moved_parameters_are_the_same_objects_to_their_optimizer(unet) -> None:
    tuned(unet)
    parameters = coeff_parameters(unet)
    values = [parameter.detach().clone() for parameter in parameters]
    for coefficients in layer_coefficients(unet):
        coefficients.move(CPU)
    assert all(one is other for one, other in zip(coeff_parameters(unet), parameters, strict=True))
    torch.testing.assert_close([p.detach() for p in parameters], values, rtol=0, atol=0)


# torch.compile


class Graphs:
    """A backend that keeps the graphs and runs them."""

    def __init__(self) -> None:
        self.seen: list[torch.fx.GraphModule] = []

    def __call__(self, graph, inputs):
        self.seen.append(graph)
        return graph


@pytest.mark.slow
def test_one_graph_without_copies_for_all_values_and_what_is_lost_is_noticed(monkeypatch) -> None:
    moves: list[nn.Module] = []
    monkeypatch.setattr(ModelRecord, "move", lambda self, model: moves.append(model))
    host = HOSTS["sd3"]
    config = {**host.build().config, "num_layers": 1, "dual_attention_layers": ()}
    model = tuned(visible(SD3Transformer2DModel.from_config(config).eval()))
    backend = Graphs()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        host.run(compiled)
        assert moves == [model]  # before the trace, so that the graph has nothing to move
        for parameter in coeff_parameters(model):
            parameter.mul_(-1.5)
        moves.clear()
        with torch._dynamo.config.patch(error_on_recompile=True):
            out = host.run(compiled)
        torch.testing.assert_close(out, host.run(model), rtol=0, atol=0)  # the same operations
        (graph,) = backend.seen
        (delta,) = [node for node in graph.graph.nodes if node.op == "placeholder" and "coeff" in node.name]
        assert "to" not in [str(user.target) for user in delta.users]

        model.set_attn_processor(JointAttnProcessor2_0())
        with pytest.raises(RuntimeError, match="was replaced by JointAttnProcessor2_0"):
            host.run(compiled)
        set_coeff_adapters(model, "default")
        torch.testing.assert_close(host.run(compiled), out, rtol=0, atol=0)
        model.transformer_blocks[0] = SD3Transformer2DModel.from_config(config).transformer_blocks[0]
        with pytest.raises(RuntimeError, match=r"1 of 1 layers .* other modules by now, .*blocks.0.attn'"):
            host.run(compiled)


def test_a_copy_has_a_record_of_its_own(unet) -> None:
    tuned(unet)
    for twin in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        record = known_record(twin)
        assert record.model is twin
        assert record.key != known_record(unet).key
        assert {id(c) for c in record.layers.values()} == {id(c) for c in layer_coefficients(twin)}
    assert len(attention_layers(unet)) == len(known_record(unet).layers)


# Export


class Alone(nn.Module):
    """A UNet's call with tensors alone."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample, timestep, text):
        return self.unet(sample, timestep, text, return_dict=False)[0]


def test_onnx_has_an_operator_for_all_that_is_exported(unet, monkeypatch) -> None:
    tuned(unet)
    inputs = tuple(HOSTS["unet"].inputs()[name] for name in ("sample", "timestep", "encoder_hidden_states"))
    expected = Alone(unet)(*inputs).detach()
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    # the newer exporter starts with this, the older one with a trace
    program = torch.export.export(Alone(unet), inputs, strict=False)
    assert not any("coeff_diffusers" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*inputs), expected, rtol=1e-4, atol=1e-4)  # other sums
    traced = torch.jit.trace(Alone(unet), inputs, check_trace=False)
    assert "coeff_diffusers::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(*inputs), expected, rtol=1e-4, atol=1e-4)  # other sums
