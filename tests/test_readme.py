"""What the documents say is there, is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import coeff_diffusers
from coeff_diffusers.training.settings import dreambooth as settings

ROOT = Path(__file__).parent.parent
FOLDERS = ("", "comfyui/", "docs/", "examples/", "examples/emoji/*/", "examples/space/", "training/", "training/*/")
PAGES = sorted(page for folder in FOLDERS for page in ROOT.glob(f"{folder}*.md"))


@pytest.fixture(params=PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def page(request: pytest.FixtureRequest) -> Path:
    return request.param


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_links_and_images_lead_somewhere(page) -> None:
    text = page.read_text()
    links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text)
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing
    assert "@@" not in text


def test_the_address_of_the_repository_is_one(page) -> None:
    known = re.search(r'^REPOSITORY = "(.*)"$', (ROOT / "setup.py").read_text(), re.MULTILINE)[1]
    assert set(re.findall(r"git clone (https://[^\s`]*)", page.read_text())) <= {known}


def headings(page: Path) -> set[str]:
    """As GitHub names them, and mkdocs."""
    found = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL), re.M
    )
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_headings_that_are_linked_exist(page) -> None:
    links = re.findall(r"\]\(([^)#\s]*)#([^)]+)\)", page.read_text())
    there = [(page.parent / path if path else page, heading) for path, heading in links if "://" not in path]
    assert not [heading for target, heading in there if heading not in headings(target)]


def test_flags_of_the_training_script_exist(page) -> None:
    for block in blocks(page.read_text(), "bash"):
        for command in re.sub(r"\\\n", " ", block).splitlines():
            if "training/train_dreambooth.py" not in command or "IMAGES" in command:
                continue
            _, _, given = command.partition("training/train_dreambooth.py")
            names = re.findall(r"--(\w+)", given)
            known = set(settings.DreamBoothSettings.__dataclass_fields__) | {"config"}
            assert not {name.removeprefix("no_") for name in names} - known


def test_every_public_name_is_in_the_readme_or_in_a_page_of_the_docs() -> None:
    text = " ".join(page.read_text() for page in PAGES)
    assert not [name for name in coeff_diffusers.__all__ if name not in text]
