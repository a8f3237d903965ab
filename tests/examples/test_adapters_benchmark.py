"""The benchmark of adapters runs, on fewer of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "examples" / "benchmarks"))
import adapters


@pytest.mark.slow
def test_the_benchmark_of_adapters_measures_what_it_says() -> None:
    figures = adapters.resident_adapters(4)
    assert figures["coefficients of each"] == 50_000
    table = adapters.resident_table(figures)
    assert "| adapters | 4 |" in table
    what, times = adapters.embedded_model(repeats=1)
    assert list(times) == ["8 subjects", "1 subject", "8 calls", "no adapter"]
    assert what in adapters.batch_table([(what, times)])
