"""The Triton kernels without a GPU: what they compute, in Triton's interpreter; what they compile to, by target."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", minversion="3.6", reason="there is no triton for this platform, or that of an old torch")

import triton_targets

TESTS = Path(__file__).parent
CASES = [  # of triton_interpreted.py, whose import would make this process one of the interpreter
    "several strips",
    "several strips, float16",
    "one head",
    "a boolean mask of every entry, one row empty",
    "a boolean mask of keys",
    "an additive mask of keys",
    "an additive mask of every head",
    "causal",
    "38 heads",
    "some heads unmixed",
    "a sample unmixed",
    "nothing mixed",
    "large coefficients",
    "tiles that end where the arrays end",
    "keys in several parts",
    "tiny",
]
CLAIMS = [
    "strides_do_not_matter",
    "offsets_beyond_32_bits_are_right",
    "the_least_number_of_a_dtype_masks_evenly",
    "a_boolean_mask_hides_even_what_is_not_a_number",
    "what_is_not_a_number_is_not_hidden",
    "equal_inputs_give_equal_bits",
    "gradients_that_are_not_wanted_are_empty",
    "the_check_of_a_card_passes_and_notices_a_wrong_kernel",
    "the_operator_serves_compile_checkpointing_and_autocast",
]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict:
    results = tmp_path_factory.mktemp("interpreted") / "results.json"
    process = subprocess.run(
        [sys.executable, TESTS / "triton_interpreted.py", results],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr
    return json.loads(results.read_text())


@pytest.mark.slow
def test_all_that_was_interpreted_is_asked_for(interpreted) -> None:
    assert list(interpreted) == [*CASES, *CLAIMS]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_kernels_lose_no_more_than_twice_what_sdpa_loses(interpreted, case) -> None:
    """Against float64, each of the output and the gradients of query, key, value and coefficients.

    Twice a rounding to the dtype, where SDPA loses less than one: its kernels for CPUs keep small maps in float32.
    """
    errors = interpreted[case]
    assert len(errors["ours"]) == 5
    for ours, sdpa in zip(errors["ours"], errors["sdpa"]):
        assert 0 < ours <= 2 * max(sdpa, errors["rounding"])


@pytest.mark.slow
@pytest.mark.parametrize("claim", CLAIMS)
def test_claim(interpreted, claim) -> None:
    assert interpreted[claim] is True


BF16, FP16 = torch.bfloat16, torch.float16
SDXL, FLUX, SD35 = (2, 10, 4096, 4096, 64), (1, 24, 4608, 4608, 128), (1, 38, 4250, 4250, 64)
SD15 = (2, 8, 4096, 4096, 40)
# Every target, every row of the table on the one with the least shared memory of those that have it, and the table's
# three numbers of heads; float16 takes the most registers.
COMPILED = [(target, FLUX, FP16) for target in ("sm_80", "sm_120", "gfx942")]
COMPILED += [(target, SD35, FP16) for target in ("sm_86", "sm_90", "sm_100", "gfx942")]
COMPILED += [("sm_89", SD15, FP16)]
# The default's, for wide heads; a text of 77 tokens; sizes of one, which Triton compiles as constants; a long video of
# FLUX's heads.
COMPILED += [
    ("sm_120", (2, 16, 300, 300, 200), FP16),
    ("sm_80", (2, 10, 4096, 77, 64), BF16),
    ("sm_86", (3, 2, 1, 1, 8), FP16),
    ("sm_90", (1, 24, 75000, 75000, 128), FP16),
]


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "shape", "dtype"), COMPILED, ids=str)
def test_kernels_compile_without_spills_fit_and_load_sixteen_bytes_at_a_time(
    monkeypatch, architecture, shape, dtype
) -> None:
    """What gpu.py would launch there. No input has a value: that it gets this far shows that none is waited for."""
    launches = triton_targets.launches(monkeypatch, architecture, shape, dtype)
    assert {"plain_kernel", "exps_kernel", "mix_kernel", "times_kernel"} < {launch.name for launch in launches}
    for launch in launches:
        found = triton_targets.compiled(launch, architecture)
        assert found.spilled == 0, launch.name
        assert found.shared <= triton_targets.TARGETS[architecture][0], launch.name
        assert found.narrow_loads == 0 or shape[-1] > 128, launch.name  # whose tiles are smaller than their programs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "rows", "kind"), [(torch.bool, 4096, 1), (torch.float32, 4096, 2), (torch.bool, 1, 3)]
)
def test_kernels_with_masks_compile(monkeypatch, dtype, rows, kind) -> None:
    mask = torch.empty(2, 1, rows, 4096, dtype=dtype, device="meta")
    launches = triton_targets.launches(monkeypatch, "sm_90", SDXL, BF16, mask)
    with_masks = {launch.name: launch for launch in launches if "mask" in launch.arguments}
    assert all(launch.arguments["MASK"] == kind for launch in with_masks.values())
    assert list(with_masks) == ["plain_kernel", "exps_kernel", "maps_kernel"]
    assert triton_targets.compiled(with_masks["exps_kernel"], "sm_90").spilled == 0


@pytest.mark.parametrize("architecture", triton_targets.TARGETS)
def test_strips_stay_within_their_memory(monkeypatch, architecture) -> None:
    """128 MB above inputs and outputs for SDXL's largest layers; 256 MB for FLUX's, with gradients."""
    for shape, limits in ((SDXL, (128, 128)), (FLUX, (128, 256))):
        launches = {
            launch.name: launch.arguments for launch in triton_targets.launches(monkeypatch, architecture, shape, BF16)
        }
        forward = {"strip": "exps_kernel", "tops": "exps_kernel", "sums": "exps_kernel", "partial": "times_kernel"}
        backward = ["maps", "grads", "products"]
        took = [
            sum(_bytes(launches[kernel][name]) for name, kernel in forward.items()),
            sum(_bytes(launches["grads_kernel"][name]) for name in backward)
            + sum(_bytes(launches["keys_kernel"][name]) for name in ("grad_key", "grad_value")),
        ]
        assert all(bytes_ <= limit * 2**20 for bytes_, limit in zip(took, limits)), took


def _bytes(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()
