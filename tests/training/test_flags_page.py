"""docs/training.md names every flag of the script, and none that is not there."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from coeff_diffusers.training.settings import DreamBoothSettings, parse_settings

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
CARDS = ROOT / "training" / "configs" / "memory"
FLAGS = {setting.name for setting in fields(DreamBoothSettings)} | {"config", "help-all", "optimizer_type"}


def flags_in(text: str) -> list[str]:
    return re.findall(r"`--([\w-]+)`", text)


def rows(heading: str) -> list[list[str]]:
    """Cells of the table under a heading."""
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `--")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_every_flag_stands_in_one_row_and_those_left_out_do_not_exist() -> None:
    here, left_out = [], []
    for theirs, ours, *_ in rows("diffusers' flags"):
        assert ours in ("same", "no") or flags_in(ours), f"{theirs}: {ours}"
        (left_out if ours == "no" else here).extend(flags_in(theirs) if ours in ("same", "no") else [])
        here += [name for name in flags_in(ours) if name not in here]
    own = [name for flag, _ in rows("Flags that diffusers' scripts do not have") for name in flags_in(flag)]
    assert sorted(here + own) == sorted(FLAGS - {"help-all", "optimizer_type"}), (
        "docs/training.md needs one row for each flag"
    )
    assert not FLAGS & set(left_out)


def test_flags_named_in_the_text_exist() -> None:
    text = "\n".join(line for line in PAGE.splitlines() if not line.startswith("|"))
    assert {name.removeprefix("no_") for name in flags_in(text)} <= FLAGS


def test_the_configs_for_cards_are_understood_and_explained() -> None:
    rest = ["--instance_data_dir", "images", "--instance_prompt", "a sks dog", "--output_dir", "out"]
    page, files = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8"), sorted(CARDS.glob("*.yaml"))
    assert len(files) == 10
    for file in files:
        assert parse_settings(["--config", str(file), *rest]).train_batch_size
        assert f"--config training/configs/memory/{file.name}" in file.read_text(encoding="utf-8")
        assert f"(../training/configs/memory/{file.name})" in page
