"""What a run is said to take before its model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import SIDE, tiny_pipeline
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from coeff_diffusers.commands.generate import base_pipeline
from coeff_diffusers.quantization import Quantization
from coeff_diffusers.training import parse_settings
from coeff_diffusers.training.errors import InputError
from coeff_diffusers.training.families import find_family, find_quantization, pipeline_index
from coeff_diffusers.training.run import plan as module
from coeff_diffusers.training.run.dreambooth import TrainingResult
from coeff_diffusers.training.run.offload import offloadable_blocks
from coeff_diffusers.training.run.plan import Phase, Plan, plan_run
from coeff_diffusers.training.run.quantised import compute_as_quantised, quantised_layers
from coeff_diffusers.training.run.tally import Tally, fake_tensors

Argv = Callable[..., list[str]]
ASKING = ("QwenImagePipeline", "ZImagePipeline", "Lumina2Pipeline")  # for the values of tensors: lengths, masks


def planned(argv: list[str], precision: str = "no", device: str = "cpu") -> Plan:
    settings = parse_settings(argv)
    index = pipeline_index(settings)
    quantization = find_quantization(settings, index, settings.train_text_encoder, torch.device("cpu"))
    return plan_run(find_family(settings, index), settings, index, precision, quantization, device_type=device)


def phases(plan: Plan) -> dict[str, Phase]:
    return {phase.name: phase for phase in plan.phases}


def test_the_tally_counts_what_lives_at_once() -> None:
    with fake_tensors():
        known = torch.nn.Linear(100, 100, bias=False)
        with Tally(known) as tally:
            first = torch.empty(1000)  # 4,000 bytes
            second = first * 2
            del first
            third = known.weight.T[0, :10] + second[:10]  # views take nothing
            assert (tally.now, tally.peak) == (4040, 8000)
            del second, third
            assert tally.now == 0


def test_integers_have_values_and_all_else_has_shapes() -> None:
    with fake_tensors(), Tally() as tally:
        mask = torch.tensor([[True, True, False], [True, False, False]])
        assert mask.sum(1).tolist() == [2, 1]
        assert tally.now == 6
        tokens = torch.ones(2, 3, 8)[mask]
        assert isinstance(tokens, FakeTensor)
        assert tokens.shape == (3, 8)
        assert isinstance(torch.arange(3.0) > mask.sum(), FakeTensor)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", *ASKING])
def test_the_plan_is_what_the_same_steps_hold_of_real_tensors(
    name: str, argv: Argv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline: Any = tiny_pipeline(name)
    pipeline.save_pretrained(tmp_path / "base")
    fixed = {"pretrained_model_name_or_path": tmp_path / "base", "validation_prompt": ["a fox"]}
    flags = argv(**fixed, resolution=SIDE, gradient_checkpointing=True, checkpoint_every=2)
    told = planned(flags)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    monkeypatch.setattr(module, "pipeline_of_configs", lambda *args: pipeline)
    monkeypatch.setattr(module, "fake_tensors", lambda *models: nullcontext())
    held = planned(flags)
    assert [phase.name for phase in told.phases] == ["prompts", "training", "validation"]
    assert [(phase.name, phase.weights) for phase in held.phases] == [(p.name, p.weights) for p in told.phases]
    excess = [real.rest - fake.rest for real, fake in zip(held.phases, told.phases)]
    assert excess[0] == excess[2] == 0
    assert 0 <= excess[1] <= tables(pipeline.components.get("transformer"))  # whose copies that are fake come and go


def tables(model: Any) -> int:
    """Bytes of the tensors that modules keep beside their parameters and buffers, as of rotary embeddings."""
    kept = [vars(module).values() for module in model.modules()] if model is not None else []
    return sum(t.untyped_storage().nbytes() for t in tree_leaves([*map(list, kept)]) if type(t) is torch.Tensor)


def test_what_takes_less(argv: Argv) -> None:
    fixed = {"resolution": 16, "center_crop": True, "train_batch_size": 1}
    less = {"gradient_checkpointing": True, "cache_latents": True, "quantize": "torchao_int8"}
    plain, small = (phases(planned(argv(**fixed | changes)))["training"] for changes in ({}, less))
    assert small.rest < 0.7 * plain.rest
    pipeline = tiny_pipeline("StableDiffusionPipeline")
    vae = sum(p.numel() for p in pipeline.vae.parameters())
    linear = sum(m.weight.numel() for m in pipeline.unet.modules() if isinstance(m, torch.nn.Linear))
    assert plain.weights - small.weights == 4 * vae + 3 * linear


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "FluxPipeline"])  # blocks are called by place, by name
def test_what_is_offloaded_is_not_on_a_gpu(argv: Argv, tmp_path: Path, name: str) -> None:
    pipeline = tiny_pipeline(name)
    pipeline.save_pretrained(tmp_path / name)
    fixed = {"resolution": SIDE, "train_batch_size": 4, "center_crop": True, "cache_latents": True}
    fixed["pretrained_model_name_or_path"] = tmp_path / name
    group = {"group_offload": True}
    ways = ({"gradient_checkpointing": True}, group, group | {"offload_activations": True})
    kept, offloaded, both = (phases(planned(argv(**fixed | way), device="cuda"))["training"] for way in ways)
    blocks = offloadable_blocks(getattr(pipeline, "unet", None) or pipeline.transformer)
    sizes = sorted(4 * sum(p.numel() for p in block.parameters()) for block in blocks)
    assert kept.weights - offloaded.weights == sum(sizes[:-3])
    assert sum(sizes[:-3]) > 0 or len(sizes) < 4
    assert both.weights == offloaded.weights
    assert both.rest < offloaded.rest <= kept.rest
    assert phases(planned(argv(**fixed | ways[2])))["training"] == phases(planned(argv(**fixed | ways[1])))["training"]


@pytest.mark.parametrize(
    ("method", "held", "checkpointed"),
    [  # layers of 40,000 bytes, activations of 400
        ("bnb_nf4", 400, 400),
        ("bnb_int8", 800, 800),  # the second layer's input
        ("quanto_int8", 800, 400),
        ("torchao_int8", 80400, 400),  # both layers' weights
    ],
)
def test_what_quantised_layers_hold_for_the_backward_pass(method: str, held: int, checkpointed: int) -> None:
    layers = torch.nn.Sequential(*(torch.nn.Linear(100, 100, bias=False).requires_grad_(False) for _ in range(2)))
    compute_as_quantised(layers, method)
    with fake_tensors(layers):
        inputs = torch.ones(1, 100, requires_grad=True)
        with Tally(layers) as tally:
            output = layers(inputs)
            assert tally.now == held
            output.sum().backward()
            del output
            inputs.grad = None
            output = checkpoint(layers, inputs, use_reentrant=False)
            assert tally.now == output.nbytes + checkpointed - 400 == checkpointed


def test_the_words_of_a_text_encoder_are_not_quantised() -> None:
    encoder = tiny_pipeline("Flux2KleinPipeline").text_encoder
    assert encoder.lm_head not in list(quantised_layers(encoder))


def test_a_transformer_with_a_lora_in_bf16(argv: Argv, tmp_path: Path) -> None:
    tiny_pipeline("FluxPipeline").save_pretrained(tmp_path / "flux")
    flags = argv(pretrained_model_name_or_path=tmp_path / "flux", resolution=SIDE, lora_rank=2, train_batch_size=1)
    told, of_gpu = (phases(planned(flags, "bf16", device))["training"] for device in ("cpu", "cuda"))
    assert of_gpu.rest > told.rest > 0  # whose autocast norms in float32


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], dict[str, int]]:
    """What the plan takes for the bytes of each model's weights."""
    told: list[dict[str, int]] = []
    monkeypatch.setattr(module, "_phases", lambda family, settings, weights, *_: told.append(weights) or [])

    def of(flags: list[str]) -> dict[str, int]:
        planned(flags, device="cuda")
        return told[-1]

    return of


def test_a_base_that_was_saved_quantised_counts_as_it_is(
    argv: Argv, tmp_path: Path, weights: Callable[[list[str]], dict[str, int]]
) -> None:
    """Or else a run that fits is refused, and told to quantise what is quantised."""
    plain, saved = tmp_path / "flux", tmp_path / "nf4"
    tiny_pipeline("FluxPipeline").save_pretrained(plain)
    base_pipeline(str(plain), None, "float32", Quantization("bnb_nf4"), "cpu").save_pretrained(saved)
    flags = argv(pretrained_model_name_or_path=saved)
    assert weights(flags) == weights(argv(pretrained_model_name_or_path=plain, quantize="bnb_nf4"))
    settings = parse_settings(flags)
    found = module.saved_quantization(settings, pipeline_index(settings))
    assert found == {"transformer": "bnb_nf4", "text_encoder_2": "bnb_nf4"}
    assert not [each for each in module.remedies(settings, torch.device("cpu"), True, True) if "quant" in each.flags]


def test_a_gguf_file_takes_what_its_size_is(
    argv: Argv, tmp_path: Path, weights: Callable[[list[str]], dict[str, int]]
) -> None:
    tiny_pipeline("FluxPipeline").save_pretrained(tmp_path / "flux")
    (tmp_path / "flux.gguf").write_bytes(bytes(20_000))
    flags = {"pretrained_model_name_or_path": tmp_path / "flux", "gguf_file": tmp_path / "flux.gguf"}
    assert weights(argv(**flags))["transformer"] == pytest.approx(20_000, rel=0.2)  # norms and biases are not in bits


def test_files_that_were_read_leave_a_container_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {"max": "1000", "current": "900", "stat": "anon 100\ninactive_file 750\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text, encoding="ascii")
    monkeypatch.setattr(module, "CONTAINER", tmp_path)
    assert module.free_memory_of(torch.device("cpu")) == 850


# What is made of it


def test_remedies_name_flags_that_go_together(argv: Argv) -> None:
    device = torch.device("cuda")
    for every in (1, 2):
        settings = parse_settings(argv(gradient_checkpointing=True, checkpoint_every=every, mixed_precision="fp16"))
        [offload] = [each for each in module.remedies(settings, device, False) if "group" in each.flags]
        assert parse_settings([*argv(gradient_checkpointing=True, checkpoint_every=every), *offload.flags.split()])
        assert offload.change(settings).checkpoint_every == 1


def sizes(**changes: int) -> Any:
    """Plans by made-up sizes: of weights and of all else, less where the settings say so."""

    def plan_run(kind: Any, settings: Any, *args: Any) -> Plan:
        weights, rest = changes["weights"], changes["rest"]
        if settings.quantize:
            weights //= 2 if settings.quantize == "torchao_int8" else 4
        if settings.gradient_checkpointing:
            rest //= 2
        return Plan((Phase("training", weights << 30, (rest * settings.train_batch_size) << 30),))

    return plan_run


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what a device has and what a run takes, in GiB."""

    def build(free: int, whole: int, **changes: int) -> None:
        monkeypatch.setattr(module, "free_memory_of", lambda device: free << 30)
        monkeypatch.setattr(module, "whole_memory_of", lambda device: whole << 30)
        monkeypatch.setattr(module, "plan_run", sizes(**changes))
        monkeypatch.setattr(module, "SMALL", 0)

    return build


def test_what_fits_is_said_and_nothing_else(
    memory: Callable[..., None], train: Callable[..., TrainingResult], capsys: pytest.CaptureFixture[str]
) -> None:
    memory(10, 10, weights=2, rest=4)
    train(max_train_steps=1)
    out = capsys.readouterr().out
    assert "Memory: 10.00 GiB expected beside what is taken now, of 10.00 GiB that are free: training" in out
    assert "It may not fit" not in out


def test_flags_that_make_it_fit_are_named_in_the_order_of_what_they_cost(
    memory: Callable[..., None], train: Callable[..., TrainingResult], capsys: pytest.CaptureFixture[str]
) -> None:
    memory(5, 8, weights=4, rest=4)
    train(max_train_steps=1, center_crop=True)
    lines = capsys.readouterr().out.split("It may not fit.")[1].splitlines()[1:6]
    assert [line.split()[0] for line in lines] == [
        "--cache_latents",
        "--mixed_precision",
        "--gradient_checkpointing",
        "--train_batch_size",
        "--quantize",
    ]
    assert lines[4] == "  --quantize torchao_int8 (costs some precision; 4.00 GiB)"


def test_auto_takes_them(
    memory: Callable[..., None], train: Callable[..., TrainingResult], capsys: pytest.CaptureFixture[str]
) -> None:
    memory(4, 8, weights=2, rest=4)
    settings = train(max_train_steps=1, memory="auto", mixed_precision="bf16", gradient_accumulation_steps=3).settings
    taken = (settings.gradient_checkpointing, settings.train_batch_size, settings.gradient_accumulation_steps)
    assert taken == (True, 1, 6)
    assert (settings.quantize, settings.memory) == (None, "plan")
    assert "--memory auto takes, one after the other:\n  --gradient_checkpointing (" in capsys.readouterr().out


def test_a_resumed_run_goes_on_with_what_auto_took_when_it_began(
    memory: Callable[..., None], train: Callable[..., TrainingResult], capsys: pytest.CaptureFixture[str]
) -> None:
    run: dict[str, Any] = {
        "memory": "auto",
        "checkpointing_steps": 1,
        "max_train_steps": 2,
        "lr_scheduler": "constant",
    }
    memory(2, 8, weights=1, rest=4)
    before = train(**run).settings
    assert (before.mixed_precision, before.train_batch_size) == ("bf16", 1)
    memory(8, 8, weights=1, rest=4)  # which nothing would have to be taken for
    after = train(**run | {"max_train_steps": 3}, resume_from_checkpoint="latest").settings
    begun = ("mixed_precision", "train_batch_size", "gradient_accumulation_steps", "quantize")
    assert [getattr(after, name) for name in begun] == [getattr(before, name) for name in begun]
    assert "--memory auto goes on with --mixed_precision bf16, --train_batch_size 1" in capsys.readouterr().out


def test_what_cannot_fit_is_refused(memory: Callable[..., None], train: Callable[..., TrainingResult]) -> None:
    memory(1, 8, weights=9, rest=1)
    with pytest.raises(InputError, match=r"(?s)the weights alone do not fit into the 8.00 GiB .*\n  A smaller --res"):
        train()
    with pytest.raises(InputError, match="--memory auto: 1.00 GiB are free. Not even these flags would make it fit:"):
        train(memory="auto")


def test_a_model_that_cannot_be_told(
    memory: Callable[..., None],
    train: Callable[..., TrainingResult],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory(1, 8, weights=9, rest=1)

    def fail(*args: Any) -> Any:
        raise RuntimeError("it wants to see a value\nand more")

    monkeypatch.setattr(module, "plan_run", fail)
    train(max_train_steps=1)
    assert "Memory: cannot be told before (RuntimeError: it wants to see a value)." in capsys.readouterr().out
    with pytest.raises(InputError, match="--memory auto: this model's memory cannot be told before"):
        train(memory="auto")
