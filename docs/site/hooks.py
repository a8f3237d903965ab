"""What mkdocs.yml cannot say: where the repository is, and where links lead that leave docs/.

Pages are written for the repository: a link is relative to its file. On the site, images from elsewhere in the
repository are copied, and other files are looked at where the repository is.
"""

from __future__ import annotations

import logging
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
REPOSITORY = re.findall(r'^REPOSITORY = "(.+)"', (ROOT / "setup.py").read_text(encoding="utf-8"), re.MULTILINE)[0]
LINK = re.compile(r"(!?)(\[[^]]*\])\(\.\./([^)#\s]+)(#[^)\s]+)?\)")
# how docstrings name each other: [`load_coeff_weights`]
NAME = re.compile(r"\[<code>~?([\w.]+)</code>\]")
log = logging.getLogger("mkdocs.plugins.hooks")


def on_config(config: Any) -> Any:
    config.repo_url = REPOSITORY
    config.repo_name = config.site_name
    return config


def on_files(files: Files, config: Any) -> Files:
    texts = [Path(file.abs_src_path).read_text(encoding="utf-8") for file in files.documentation_pages()]
    images = {path for text in texts for image, _, path, _ in LINK.findall(text) if image}
    for path in sorted(images):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def settings_table() -> str:
    """The fields of DreamBoothSettings, which stand in its bases and have their help beside them."""
    from coeff_diffusers.training.settings import DreamBoothSettings

    lines = ["| field, flag | default | |", "|---|---|---|"]
    for field in fields(DreamBoothSettings):
        text = field.metadata["help"].replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
        default = "" if field.default in (MISSING, None, ()) else f"`{field.default!r}`"
        lines.append(f"| `{field.name}` | {default} | {text} |")
    return "\n".join(lines)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    def on_the_site(link: re.Match[str]) -> str:
        image, text, path, heading = link.groups()
        there = ROOT / path
        if not there.exists():
            log.warning("%s links to %s, which is not there", page.file.src_path, path)
        kind = "tree" if there.is_dir() else "blob"
        target = path if image else f"{REPOSITORY}/{kind}/main/{path}{heading or ''}"
        return f"{image}{text}({target})"

    if page.is_homepage:
        page.meta["hide"] = ["navigation", "toc"]  # it is a list of the pages itself
    if "<!-- settings -->" in markdown:
        markdown = markdown.replace("<!-- settings -->", settings_table())
    return LINK.sub(on_the_site, markdown)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Names that docstrings have in brackets become links to their entries, if they have one."""
    entries = re.findall(r'<h3 id="(coeff_diffusers[\w.]+)"', html)

    def linked(name: re.Match[str]) -> str:
        found = [entry for entry in entries if entry.endswith(f".{name[1]}")]
        code = f"<code>{name[1]}</code>"
        return f'<a href="#{found[0]}">{code}</a>' if found else code

    return NAME.sub(linked, html)
