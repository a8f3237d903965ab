"""What people install: a wheel of all the code for every Python, an sdist with its tests, types, one version."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
import yaml

import coeff_diffusers

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PACKAGE = ROOT / "coeff_diffusers"


def setup(*arguments: str, folder: Path = ROOT, **environment: str) -> None:
    """Runs setup.py in `folder`."""
    command = [sys.executable, "setup.py", "--quiet", *arguments]
    subprocess.run(command, cwd=folder, env=os.environ | environment, check=True, capture_output=True)


def build_wheel(folder: Path, **environment: str) -> zipfile.ZipFile:
    """Of the package with kernels that are compiled at once."""
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for kernel in (folder / PACKAGE.name / "backends" / "csrc").glob("*.cpp"):
        kernel.write_text("")
    for file in ("LICENSE", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / file, folder)
    setup("bdist_wheel", folder=folder, **environment)
    (wheel,) = (folder / "dist").iterdir()
    return zipfile.ZipFile(wheel)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """As it is where there is no compiler."""
    return build_wheel(tmp_path_factory.mktemp("without"), CC="no-compiler", CXX="no-compiler")


@pytest.fixture(scope="module")
def metadata(wheel) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    return message_from_bytes(wheel.read(name))


def contents(wheel: zipfile.ZipFile) -> set[str]:
    return {name for name in wheel.namelist() if ".dist-info/" not in name}


def code() -> set[str]:
    return {file.relative_to(ROOT).as_posix() for file in (*PACKAGE.rglob("*.py"), PACKAGE / "py.typed")}


def tag(wheel: zipfile.ZipFile) -> str:
    return Path(str(wheel.filename)).stem.partition("-py3-")[2]


def urls(metadata: Message) -> dict[str, str]:
    return dict(url.split(", ") for url in metadata.get_all("Project-URL"))


def test_a_wheel_without_kernels_is_for_any_platform_and_holds_all_code(wheel) -> None:
    assert tag(wheel) == "none-any"
    assert contents(wheel) == code()


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("cc"), reason="no kernel is compiled here")
def test_a_wheel_with_kernels_is_for_its_platform_and_every_python(tmp_path) -> None:
    wheel = build_wheel(tmp_path)
    assert tag(wheel) == "none-" + re.sub(r"\W", "_", sysconfig.get_platform())
    kernels = {f"coeff_diffusers/backends/_{name}.so" for name in ("avx2", "avx512")}
    assert contents(wheel) == code() | kernels


def test_the_version_stands_in_one_place(metadata) -> None:
    assert metadata["Version"] == coeff_diffusers.__version__
    files = (*ROOT.glob("*.py"), *ROOT.glob("*.toml"), *ROOT.glob("*.cff"), *PACKAGE.rglob("*.py"))
    version = f'"{coeff_diffusers.__version__}"'
    assert [file for file in files if version in file.read_text(encoding="utf-8")] == [PACKAGE / "__init__.py"]


def test_links_and_images_of_the_metadata_are_absolute_and_those_of_the_readme_relative(metadata) -> None:
    (repository,) = (
        url.removeprefix("Repository, ") for url in metadata.get_all("Project-URL") if "Repository" in url
    )
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"]({repository}" not in readme
    links = re.findall(r"(!?)\[[^]]*\]\((.*?)\)", metadata.get_payload())
    assert len(links) == len(re.findall(r"\]\(", readme))
    assert all(re.match("https://", link) for _, link in links)
    assert ("", f"{repository}/blob/main/docs/speed.md#measured") in links
    assert {link for image, link in links if image} == {
        f"{repository}/raw/main/{image}" for image in re.findall(r"!\[[^]]*\]\((.*?)\)", readme)
    }


def test_every_address_of_the_repository_is_that_of_setup_py(metadata) -> None:
    repository = urls(metadata)["Repository"]
    assert all(url.startswith(repository) for url in urls(metadata).values())
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_bytes())
    assert citation["repository-code"] == repository
    assert citation["license"] == PROJECT["license"]


def test_the_sdist_holds_what_its_tests_need(tmp_path) -> None:
    setup("egg_info", "--egg-base", str(tmp_path))
    (sources,) = tmp_path.rglob("SOURCES.txt")
    folders = (".ci", ".github", "coeff_diffusers", "comfyui", "docs", "examples", "tests", "training")
    files = {file for folder in folders for file in (ROOT / folder).rglob("*") if file.is_file()}
    wanted = {file.relative_to(ROOT).as_posix() for file in files if file.suffix not in {".pyc", ".so"}}
    assert not wanted - {Path(line).as_posix() for line in sources.read_text(encoding="utf-8").splitlines()}


def test_type_checkers_follow_an_editable_install() -> None:
    """They read paths in .pth files, and run no code that finds the package."""
    found = list(Path(sysconfig.get_path("purelib")).glob("__editable__.coeff_diffusers-*.pth"))
    if not found:
        pytest.skip("not an editable install")
    assert [Path(file.read_text(encoding="utf-8").strip()) for file in found] == [ROOT]


def test_workflows_are_valid_yaml_and_try_the_pythons_that_the_metadata_names() -> None:
    workflows = {file.stem: yaml.safe_load(file.read_bytes()) for file in (ROOT / ".github" / "workflows").iterdir()}
    assert set(workflows) == {"pages", "tests", "wheels"}
    named = [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if re.search(r"3\.\d+$", name)]
    assert workflows["tests"]["jobs"]["tests"]["strategy"]["matrix"]["python"] == named
    assert PROJECT["requires-python"] == f">={named[0]}"
