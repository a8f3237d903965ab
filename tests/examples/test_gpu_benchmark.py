"""The benchmark for GPUs runs on a CPU, on tiny sizes, and writes what it says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "examples" / "benchmarks"))
import gpu as benchmark


@pytest.mark.slow
def test_a_dry_run_writes_every_part(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(benchmark.Bench, "left", lambda self: 480.0)  # however slow the machine is
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry", "--output", str(tmp_path)])
    benchmark.main(benchmark.parse_args())
    written = json.loads((tmp_path / "dry_run.json").read_text())
    assert written["torch"] == torch.__version__
    rows: dict[str, list[dict]] = {}
    for row in written["rows"]:
        assert "failed" not in row, row
        assert "left_out" not in row, row
        rows.setdefault(row["part"], []).append(row)
    assert list(rows) == ["check", "attention", "loop", "model", "subjects", "end"]
    assert all(row["right"] for row in rows["check"])
    assert len(rows["check"]) == len(benchmark.DRY_CHECKS)
    assert [(row["model"], row["kind"]) for row in rows["model"]] == [
        (model, kind) for model in benchmark.MODELS for kind in ("base", "coefficients", "LoRA", "LoRA, fused")
    ]
    assert all(
        "training" in row
        for row in rows["model"]
        if row["model"] == "SDXL" and row["kind"] in ("coefficients", "LoRA")
    )
    page = (tmp_path / "dry_run.md").read_text()
    assert all(f"## {part}\n" in page for part in rows)
    assert "| tiny, text |" in page


def test_what_fails_or_has_no_time_is_noted_and_the_rest_goes_on(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(benchmark, "mixed_attention", lambda *args, **kwargs: torch.zeros(()).item(1))
    monkeypatch.setattr(benchmark.Bench, "left", lambda self: 20.0)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry", "--output", str(tmp_path)])
    benchmark.main(benchmark.parse_args())
    rows = json.loads((tmp_path / "dry_run.json").read_text())["rows"]
    assert all("failed" in row for row in rows if row["part"] in ("check", "attention", "loop"))
    assert all("s left, 40 needed" in row["left_out"] for row in rows if row["part"] == "model")
    assert rows[-1]["part"] == "end"


def test_without_a_gpu_it_says_what_runs(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit):
        benchmark.parse_args()
    assert "torch sees no GPU; --dry runs the same code on a CPU" in capsys.readouterr().err


def test_other_tiles_of_the_sweep_fit_what_the_kernels_take() -> None:
    usual = benchmark.tiles.choose("sm_90", 10, 64, 4096, 4096)
    found = benchmark.variants(usual)
    assert set(found) == set(usual._fields) - {"plain"}
    for field, values in found.items():
        assert values
        assert getattr(usual, field) not in values
