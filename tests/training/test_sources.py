"""Which images are taken from folders and data sets, and which prompts they have."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from image_files import BLUE, RED, saved
from PIL import Image, ImageCms

from coeff_diffusers.training.errors import InputError
from coeff_diffusers.training.images.dreambooth_dataset import DreamBoothDataset, upright_rgb
from coeff_diffusers.training.images.files import find_images, folder_images, read_captions, read_sidecars
from coeff_diffusers.training.images.hub_datasets import dataset_images
from coeff_diffusers.training.run.dreambooth import TrainingResult
from coeff_diffusers.training.settings import DreamBoothSettings, parse_settings

# Folders


def test_images_are_taken_by_name_and_sidecars_hidden_files_and_folders_passed_over(tmp_path: Path) -> None:
    paths = [saved(tmp_path / name) for name in ("b.png", "A.JPG", "c.webp")]
    for name in (".DS_Store", "b.txt", "metadata.jsonl", "notes.MD"):
        (tmp_path / name).write_text("no image")
    (tmp_path / "folder").mkdir()
    assert find_images(tmp_path, "instance_data_dir") == sorted(paths)


def test_captions_are_the_column_of_each_image(tmp_path: Path) -> None:
    images = [saved(tmp_path / name) for name in ("a.png", "b.png")]
    lines = [
        '{"file_name": "b.png", "text": " a sks fox on blue "}',
        "",
        '{"file_name": "a.png", "text": "a sks fox"}',
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    expected = {images[0]: "a sks fox", images[1]: "a sks fox on blue"}
    assert read_captions(tmp_path, images, "text") == expected


def test_images_without_a_caption_and_broken_lines_are_named(tmp_path: Path) -> None:
    images = [saved(tmp_path / name) for name in ("a.png", "b.png", "c.png")]
    with pytest.raises(InputError, match="--caption_column: .* has neither metadata.jsonl nor metadata.csv"):
        read_captions(tmp_path, images, "text")
    lines = ['{"file_name": "a.png", "text": 5}', "[]", '{"file_name": "b.png",', '{"text": "a fox"}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError) as error:
        read_captions(tmp_path, images, "text")
    problems = [line.split(":")[0].strip() for line in str(error.value).splitlines()[1:]]
    assert sorted(problems) == [
        "c.png has no caption",  # what the lines below are the reason for is not said twice
        "line 1 has no file_name and text",
        "line 2 is no JSON object",
        "line 3 is no JSON",
        "line 4 has no file_name and text",
    ]


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_a_column_that_does_not_exist_is_told_with_those_that_do(tmp_path: Path, ending: str) -> None:
    texts = {"jsonl": '{"file_name": "a.png", "text": "x", "label": 1}', "csv": "file_name,text,label\na.png,x,1\n"}
    (tmp_path / f"metadata.{ending}").write_text(texts[ending])
    with pytest.raises(InputError, match=r"--caption_column: .* no column 'prompt'; it has text, label"):
        read_captions(tmp_path, [saved(tmp_path / "a.png")], "prompt")


def test_captions_are_read_from_csv_as_excel_writes_it(tmp_path: Path) -> None:
    images = [saved(tmp_path / name) for name in ("a.png", "b.png")]
    text = 'file_name,text,,\r\nb.png,"a sks fox, ""on"" blue",,\r\na.png,ein Föxchen,,\r\n'
    (tmp_path / "metadata.csv").write_text(text, encoding="utf-8-sig", newline="")
    assert read_captions(tmp_path, images, "text") == {images[0]: "ein Föxchen", images[1]: 'a sks fox, "on" blue'}
    (tmp_path / "metadata.csv").write_bytes(text.encode("utf-16"))
    with pytest.raises(InputError, match="--caption_column: .*metadata.csv cannot be read as text in UTF-8"):
        read_captions(tmp_path, images, "text")


def test_captions_that_csv_would_cut_or_hide_are_named(tmp_path: Path) -> None:
    images = [saved(tmp_path / name) for name in ("a.png", "b.png", "c.png")]
    lines = ["file_name,text,text", "a.png,a sks fox,x", "b.png,a sks fox, sitting, on red", 'c.png,"sits, red",x']
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    with pytest.raises(InputError) as error:
        read_captions(tmp_path, images, "text")
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
        "line 1 has the column text twice",
        "line 3 has 4 cells, and line 1 has 3: a text with commas stands in quotes",
    ]
    (tmp_path / "metadata.csv").write_text('file_name,text\na.png,a sks fox\nb.png,"' + "x" * 200_000)
    with pytest.raises(InputError, match=r"line 3: field larger than field limit .* not closed\?\n  c.png has no cap"):
        read_captions(tmp_path, images, "text")


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_images_that_are_listed_twice_or_not_there_are_named(tmp_path: Path, ending: str) -> None:
    images = [saved(tmp_path / "a.png")]
    (tmp_path / "within").mkdir()
    saved(tmp_path / "within" / "b.png")
    names = ["a.png", "gone.png", "./a.png", "within/b.png"]
    lines = [f'{{"file_name": "{name}", "text": "a fox"}}' for name in names]
    if ending == "csv":
        lines = ["file_name,text", *(f"{name},a fox" for name in names)]
    (tmp_path / f"metadata.{ending}").write_text("\n".join(lines))
    with pytest.raises(InputError) as error:
        read_captions(tmp_path, images, "text")
    first = 2 if ending == "csv" else 1
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
        f"line {first + 1} names gone.png, which is no image of the folder: correct it, or take it out",
        f"line {first + 2} names ./a.png, as line {first} does: leave one of them",
        f"line {first + 3} names within/b.png, which is no image of the folder: correct it, or take it out",
    ]


def test_a_json_line_that_gives_a_caption_twice_is_named(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a fox", "text": "a dog"}')
    with pytest.raises(InputError, match="line 1 is no JSON: text is given twice"):
        read_captions(tmp_path, [saved(tmp_path / "a.png")], "text")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_caption_may_hold_what_unicode_takes_for_the_end_of_a_line(tmp_path: Path, end: str) -> None:
    images = [saved(tmp_path / name) for name in ("a.png", "b.png")]
    texts = ["a\u2028sks\u2029fox\u0085sits", "a fox"]
    lines = [f'{{"file_name": "{image.name}", "text": "{text}"}}' for image, text in zip(images, texts)]
    (tmp_path / "metadata.jsonl").write_text(end.join(lines), encoding="utf-8", newline="")
    assert read_captions(tmp_path, images, "text") == dict(zip(images, texts))


COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"  # as Linux and Windows write it, and as a Mac does


@pytest.mark.parametrize(("on_disk", "listed"), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_names_with_accents_are_matched_however_these_are_spelled(tmp_path: Path, on_disk: str, listed: str) -> None:
    image = saved(tmp_path / f"{on_disk}.png")
    (tmp_path / "metadata.csv").write_text(f"file_name,text\n./{listed}.png,a fox\n", encoding="utf-8")
    (tmp_path / f"{listed}.txt").write_text("a sks fox")
    assert read_captions(tmp_path, [image], "text") == {image: "a fox"}
    assert read_sidecars([image], "txt") == {image: "a sks fox"}


def test_of_two_images_whose_names_look_alike_each_has_its_own_caption(tmp_path: Path) -> None:
    images = [saved(tmp_path / f"{name}.png") for name in (COMPOSED, DECOMPOSED)]
    if len(set(tmp_path.iterdir())) < 2:
        pytest.skip("this file system takes both for one")
    lines = [f"{COMPOSED}.png,a fox", f"{DECOMPOSED}.png,a dog"]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,text", *lines]), encoding="utf-8")
    assert read_captions(tmp_path, images, "text") == dict(zip(images, ["a fox", "a dog"]))


def test_captions_in_two_metadata_files_are_refused(tmp_path: Path) -> None:
    for name in ("metadata.jsonl", "metadata.csv"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match="has both metadata.jsonl and metadata.csv"):
        read_captions(tmp_path, [saved(tmp_path / "a.png")], "text")


@pytest.mark.parametrize("extension", ["txt", ".txt"])
def test_captions_are_the_text_beside_each_image(tmp_path: Path, extension: str) -> None:
    files = [saved(tmp_path / name) for name in ("a.1.png", "b.jpg")]
    for name, text in {"a.1.txt": "a sks fox\n", "b.txt": "a sks fox on blue", "b.caption": "another"}.items():
        (tmp_path / name).write_text(text)
    images = folder_images(tmp_path, "instance_data_dir", "a sks", caption_extension=extension)
    assert {image.name: image.prompt for image in images} == {
        str(files[0]): "a sks fox",
        str(files[1]): "a sks fox on blue",
    }


def test_images_without_text_beside_them_are_named(tmp_path: Path) -> None:
    images = [saved(tmp_path / name) for name in ("a.png", "b.png", "c.png")]
    (tmp_path / "a.txt").write_text("a sks fox")
    (tmp_path / "b.txt").write_text(" \n")
    with pytest.raises(InputError, match="--caption_extension: ") as error:
        read_sidecars(images, "txt")
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
        "b.png has no caption",
        "c.png has no caption",
    ]


def test_height_and_width_are_those_of_the_image_turned_upright(tmp_path: Path) -> None:
    stored = Image.new("RGB", (6, 4))
    stored.getexif()[0x0112] = 8
    stored.save(tmp_path / "a.jpg", exif=stored.getexif())
    (image,) = folder_images(tmp_path, "instance_data_dir", "a sks fox")
    assert (image.height, image.width, image.prompt) == (6, 4, "a sks fox")


def test_every_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    whole = saved(tmp_path / "a.png", (64, 64))
    (tmp_path / "text.png").write_text("no image")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "torn.jpg")
    (tmp_path / "torn.jpg").write_bytes((tmp_path / "torn.jpg").read_bytes()[:-500])
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(InputError, match="--instance_data_dir: these cannot be read as images") as error:
        folder_images(tmp_path, "instance_data_dir", "a sks fox")
    named = [Path(line.strip().partition(": ")[0]).name for line in str(error.value).splitlines()[1:]]
    assert named == ["empty.jpg", "text.png", "torn.jpg"]
    assert str(whole) not in str(error.value)


def test_numbers_that_cannot_be_told_as_colours_are_named(tmp_path: Path) -> None:
    values = {"float": np.float32([[0.0, 1.0]]), "fits": np.int32([[0, 65535]]), "large": np.int32([[-1, 70000]])}
    for name, array in values.items():
        Image.fromarray(array).save(tmp_path / f"{name}.tif")
    with pytest.raises(InputError, match="--instance_data_dir: these cannot be read as images") as error:
        folder_images(tmp_path, "instance_data_dir", "a sks fox")
    way_out = "so that black and white are unknown: save it as an 8- or 16-bit PNG"
    assert str(error.value).splitlines()[1:] == [
        f"  {tmp_path / 'float.tif'}: mode F has numbers of any range, {way_out}",
        f"  {tmp_path / 'large.tif'}: mode I has numbers from -1 to 70000 here, beyond 16 bits, {way_out}",
    ]


def test_a_link_to_an_image_that_is_not_there_is_named(tmp_path: Path) -> None:
    saved(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "notes.txt").symlink_to(tmp_path / "gone.txt")  # no image in any case
    with pytest.raises(InputError) as error:
        folder_images(tmp_path, "instance_data_dir", "a sks fox")
    assert str(error.value).splitlines()[1:] == [
        f"  {tmp_path / 'b.png'}: OSError: is a link to {tmp_path / 'gone.png'}, which is not there"
    ]


def test_folders_within_that_have_the_images_are_named_with_what_kohyas_names_mean(tmp_path: Path) -> None:
    for name in ("10_sks fox", "empty", "more"):
        (tmp_path / name).mkdir()
    for name in ("10_sks fox", "more"):
        saved(tmp_path / name / "a.png")
    with pytest.raises(InputError) as error:
        find_images(tmp_path, "instance_data_dir")
    first, *lines = str(error.value).splitlines()
    assert first == (
        f"--instance_data_dir: there are no images in {tmp_path} itself, and folders within it are not read; give "
        "one of those that have some:"
    )
    assert lines == [
        f'  --instance_data_dir "{tmp_path / "10_sks fox"}" --repeats 10 --instance_prompt "sks fox"',
        f'  --instance_data_dir "{tmp_path / "more"}"',
    ]
    with pytest.raises(InputError, match=r"some:\n  .*10_sks fox\n"):
        find_images(tmp_path, "class_data_dir")


# Colour profiles


def profile(change: str = "") -> bytes:
    """Of sRGB, or one by which red and green change places, or greys are darker, of RGB or of greys alone."""
    plain = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    if change == "swapped":
        return plain.replace(b"rXYZ", b"----").replace(b"gXYZ", b"rXYZ").replace(b"----", b"gXYZ")
    if change:
        plain = plain.replace(b"\x00\x02\x66\x66", b"\x00\x04\x00\x00")  # a gamma of 4.0, not 2.4
    return plain.replace(b"RGB ", b"GRAY", 1).replace(b"rTRC", b"kTRC") if change == "grey" else plain


def warned(folder: Path) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        folder_images(folder, "instance_data_dir", "a sks fox")
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tif"])
def test_colours_are_what_the_files_profile_says(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    image = Image.new("RGB", (16, 8), (200, 30, 30))
    image.getexif()[0x0112] = 6  # to be turned, after which the profile is still there
    image.save(path, quality=100, icc_profile=profile("swapped"), exif=image.getexif())
    assert warned(tmp_path) == []
    with Image.open(path) as opened:
        shown = upright_rgb(opened, "white")
    assert shown.size == (8, 16)
    assert shown.getpixel((4, 4)) == pytest.approx((30, 200, 30), abs=3)  # JPEG and WebP round


def test_profiles_of_srgb_change_no_bit_and_no_runs_identity(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    for name, of in (("none", None), ("srgb", profile()), ("swapped", profile("swapped"))):
        noise.save(tmp_path / f"{name}.png", icc_profile=of)
    none, srgb, swapped = folder_images(tmp_path, "instance_data_dir", "a sks fox")
    assert upright_rgb(srgb.read(), "white").tobytes() == noise.tobytes()
    assert srgb.digest == none.digest  # by which a run that goes on knows its images
    assert swapped.digest != none.digest


@pytest.mark.parametrize(
    ("mode", "change"),
    [*((mode, "dark") for mode in ("L", "LA", "P", "RGB", "RGBA", "I;16")), ("L", "grey"), ("LA", "grey")],
)
def test_a_profile_counts_in_every_mode_and_leaves_alone_what_is_transparent(mode: str, change: str) -> None:
    image = Image.new("RGBA", (2, 1), (128, 128, 128, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    if mode == "I;16":
        image = Image.fromarray(np.full((1, 2), 128 * 257, dtype=np.uint16))
    elif mode == "P":
        image = Image.new("P", (2, 1))
        image.putpalette([128, 128, 128, 0, 0, 0])
        image.putpixel((1, 0), 1)
        image.info["transparency"] = 1
    else:
        image = image.convert(mode)
    image.info["icc_profile"] = profile(change)
    shown = upright_rgb(image, "#0000ff")
    assert shown.getpixel((0, 0)) == (79, 79, 79)  # 4.0 instead of 2.4 in sRGB's formula
    if mode[-1] in "AP":
        assert shown.getpixel((1, 0)) == BLUE


def test_a_profile_that_cannot_be_used_is_a_warning_that_names_the_file(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), RED).save(tmp_path / "torn.png", icc_profile=profile()[:200])
    Image.new("CMYK", (4, 4)).save(tmp_path / "other.jpg", icc_profile=profile())
    Image.new("RGB", (4, 4)).save(tmp_path / "part.jpg", icc_profile=profile())
    whole = (tmp_path / "part.jpg").read_bytes()
    (tmp_path / "part.jpg").write_bytes(
        whole.replace(b"ICC_PROFILE\x00\x01\x01", b"ICC_PROFILE\x00\x01\x02")
    )  # of two
    other, part, torn = warned(tmp_path)
    said = "its colour profile cannot be used, and it is taken for sRGB:"
    assert other == f"{tmp_path / 'other.jpg'}: {said} it is for RGB, and the image is in CMYK"
    assert part == f"{tmp_path / 'part.jpg'}: {said} parts of it are missing"
    assert torn.startswith(f"{tmp_path / 'torn.png'}: {said} ")
    with Image.open(tmp_path / "torn.png") as image:
        assert upright_rgb(image, "white").getpixel((0, 0)) == RED


def test_a_missing_an_empty_and_a_false_folder_are_told_apart(tmp_path: Path) -> None:
    file = saved(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("a caption alone")
    for folder, problem in (
        ("none", "does not exist"),
        ("a.png", "is no folder"),
        ("empty", "there are no images in"),
    ):
        with pytest.raises(InputError, match=f"--class_data_dir: .*{problem}"):
            find_images(tmp_path / folder, "class_data_dir")
    assert find_images(tmp_path / "empty", "class_data_dir", empty_allowed=True) == []
    assert file.exists()


# Data sets


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """For what the datasets library writes; nothing is looked for on the Hub."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def settings(name: Path | str, cache: Path, **changes: Any) -> DreamBoothSettings:
    given = {"pretrained_model_name_or_path": "base", "instance_prompt": "a sks fox", "cache_dir": str(cache)}
    return DreamBoothSettings(**given, dataset_name=str(name), **changes)


def rows(folder: Path, column: str = "image") -> datasets.Dataset:
    """A red and a blue image with captions."""
    folder.mkdir()
    files = [str(saved(folder / f"{i}.png", (8, 4), color)) for i, color in enumerate((RED, BLUE))]
    made = datasets.Dataset.from_dict({column: files, "text": ["a red fox", " a blue fox "], "label": [0, 1]})
    return made.cast_column(column, datasets.Image())


def seen(images: list[Any]) -> list[tuple[str, Any, int, int]]:
    """Prompt, first pixel, height and width of each."""
    return [(p.prompt, p.read().convert("RGB").getpixel((0, 0)), p.height, p.width) for p in images]


EXPECTED = [("a red fox", RED, 4, 8), ("a blue fox", BLUE, 4, 8)]


def test_images_and_captions_come_from_parquet_in_a_file_and_in_a_folder(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "train.parquet"
    rows(tmp_path / "files").to_parquet(file)
    for name in (file, file.parent):
        images = dataset_images(settings(name, cache, caption_column="text"))
        assert seen(images) == EXPECTED
        assert images[1].name == f"{name}, row 1"


def test_images_and_captions_come_from_an_imagefolder(tmp_path: Path, cache: Path) -> None:
    saved(tmp_path / "a.png", (8, 4), RED)
    saved(tmp_path / "b.png", (8, 4), BLUE)
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a red fox\nb.png, a blue fox \n")
    assert seen(dataset_images(settings(tmp_path, cache, caption_column="text"))) == EXPECTED
    assert {p.prompt for p in dataset_images(settings(tmp_path, cache))} == {"a sks fox"}


def test_a_data_set_may_lie_where_names_look_like_patterns(tmp_path: Path, cache: Path) -> None:
    made = rows(tmp_path / "my [dog]")
    chosen = settings(tmp_path / "my [dog]", cache)
    (tmp_path / "my [dog]" / "metadata.csv").write_text("file_name,text\n0.png,a red fox\n1.png,a blue fox\n")
    assert seen(dataset_images(replace(chosen, caption_column="text"))) == EXPECTED
    for split in ("train", "test"):  # found in a folder below it as well
        (tmp_path / "my [dog]" / "splits" / split).mkdir(parents=True)
        saved(tmp_path / "my [dog]" / "splits" / split / "a.png", (8, 4), RED)
    assert seen(dataset_images(replace(chosen, dataset_name=f"{chosen.dataset_name}/splits"))) == [
        ("a sks fox", RED, 4, 8)
    ]
    made.to_parquet(tmp_path / "my [dog].parquet")
    assert len(dataset_images(settings(tmp_path / "my [dog].parquet", cache))) == 2


def test_images_come_from_what_save_to_disk_wrote_in_its_only_split(tmp_path: Path, cache: Path) -> None:
    made = rows(tmp_path / "files", "image")
    made.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"test": made}).save_to_disk(tmp_path / "splits")
    datasets.DatasetDict({"test": made, "dev": made}).save_to_disk(tmp_path / "none")
    for name in ("saved", "splits"):
        chosen = settings(tmp_path / name, cache, image_column="image", caption_column="text")
        assert seen(dataset_images(chosen)) == EXPECTED
    with pytest.raises(InputError, match="--dataset_name: .* has no split train, but test, dev"):
        dataset_images(settings(tmp_path / "none", cache))


def test_encoded_bytes_without_a_type_are_images(tmp_path: Path, cache: Path) -> None:
    encoded = [{"bytes": saved(tmp_path / "a.png", (8, 4)).read_bytes(), "path": None}]
    datasets.Dataset.from_dict({"image": encoded}).to_parquet(tmp_path / "train.parquet")
    assert seen(dataset_images(settings(tmp_path / "train.parquet", cache))) == [("a sks fox", RED, 4, 8)]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"image_column": "img"}, "--image_column: .* has no column 'img'; it has image, text, label"),
        ({"caption_column": "prompt"}, "--caption_column: .* has no column 'prompt'; it has image, text, label"),
        ({"image_column": "label"}, "--image_column: 'label' holds no images but Value"),
        ({"caption_column": "label"}, "--caption_column: these rows of .* have no text in 'label':\n  row 0\n  row 1"),
        ({"dataset_config_name": "en"}, "--dataset_config_name: .* has no configurations"),
    ],
)
def test_columns_and_configurations_that_do_not_fit_are_told(
    tmp_path: Path, cache: Path, changes: dict[str, str], problem: str
) -> None:
    rows(tmp_path / "files").save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match=problem):
        dataset_images(settings(tmp_path / "saved", cache, **changes))


def test_rows_that_hold_no_image_are_named(tmp_path: Path, cache: Path) -> None:
    whole = saved(tmp_path / "a.png", (64, 64)).read_bytes()
    column = [{"bytes": data, "path": None} for data in (whole, b"no image", whole)] + [None]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": column}, features).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match="--dataset_name: these cannot be read as images") as error:
        dataset_images(settings(tmp_path / "saved", cache))
    lines = str(error.value).splitlines()[1:]
    assert [line.partition(": ")[0].rpartition(", ")[2] for line in lines] == ["row 1", "row 3"]


def test_a_data_set_that_is_not_there_is_told(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "images.zip").touch()
    with pytest.raises(InputError, match=r"--dataset_name: .*none that ends in .parquet"):
        dataset_images(settings(tmp_path / "images.zip", cache))
    with pytest.raises(InputError, match="--dataset_name: .*none cannot be loaded: "):
        dataset_images(settings(tmp_path / "none", cache))


def test_without_the_datasets_library_its_installation_is_named(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"--dataset_name needs datasets: pip install 'coeff_diffusers\[datasets\]'"):
        dataset_images(settings(tmp_path, cache))


def test_a_data_sets_images_are_turned_and_laid_on_the_stated_colour(tmp_path: Path, cache: Path) -> None:
    turned = Image.new("RGB", (8, 4), RED)
    turned.getexif()[0x0112] = 6
    (tmp_path / "images").mkdir()
    turned.save(tmp_path / "images" / "a.jpg", exif=turned.getexif())
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "images" / "b.png")
    images = dataset_images(settings(tmp_path / "images", cache))
    assert [(image.height, image.width) for image in images] == [(8, 4), (4, 4)]
    data = DreamBoothDataset(2, images, [], resolution=4, seed=0, background_color="#0000ff")
    transparent = next(example for (example,) in (data[0], data[1]) if example.name.endswith("row 1"))
    assert transparent.pixels[:, 0, 0].tolist() == [-1.0, -1.0, 1.0]


def test_a_data_sets_images_have_the_colours_that_their_profiles_say(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4), (200, 30, 30)).save(tmp_path / "images" / "a.png", icc_profile=profile("swapped"))
    (image,) = dataset_images(settings(tmp_path / "images", cache))
    assert upright_rgb(image.read(), "white").getpixel((0, 0)) == pytest.approx((30, 200, 30), abs=1)


def test_a_run_on_a_data_set_is_the_run_on_its_files(
    train: Callable[..., TrainingResult], images: Path, tmp_path: Path, cache: Path
) -> None:
    files = sorted(images.iterdir())
    made = datasets.Dataset.from_dict({"image": [str(path) for path in files], "text": ["a fox", "b", "c"]})
    made.cast_column("image", datasets.Image()).to_parquet(tmp_path / "train.parquet")
    (tmp_path / "folder").mkdir()
    for path, text in zip(files, ["a fox", "b", "c"]):
        (tmp_path / "folder" / path.name).write_bytes(path.read_bytes())
        (tmp_path / "folder" / f"{path.stem}.caption").write_text(text)
    of_files = train(
        instance_data_dir=tmp_path / "folder", caption_extension="caption", num_train_epochs=1, max_train_steps=None
    )
    of_rows = train(
        instance_data_dir=None,
        dataset_name=tmp_path / "train.parquet",
        caption_column="text",
        cache_dir=cache,
        output_dir=tmp_path / "rows",
    )
    assert len(of_files.losses) == 2
    assert of_rows.losses[:2] == of_files.losses


def test_an_epoch_shows_each_image_as_often_as_repeats_say(train: Callable[..., TrainingResult]) -> None:
    result = train(num_train_epochs=1, max_train_steps=None, repeats=4, train_batch_size=3)
    assert result.settings.max_train_steps == 4  # of 3 images each, with 3 images 4 times


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, "give either --instance_data_dir or --dataset_name, for the subject's images"),
        ({"instance_data_dir": "in", "dataset_name": "d"}, "give either --instance_data_dir or --dataset_name"),
        ({"instance_data_dir": "in", "image_column": "img"}, "--image_column needs --dataset_name"),
        ({"instance_data_dir": "in", "cache_dir": "c"}, "--cache_dir needs --dataset_name"),
        ({"instance_data_dir": "in", "dataset_config_name": "c"}, "--dataset_config_name needs --dataset_name"),
        ({"dataset_name": "d", "caption_extension": "txt"}, "--caption_extension is of files beside images"),
        (
            {"instance_data_dir": "in", "caption_extension": "txt", "caption_column": "text"},
            "--caption_column and --caption_extension exclude each other",
        ),
        ({"dataset_name": "d", "repeats": 0}, "--repeats must be at least 1, got 0"),
    ],
)
def test_flags_of_sources_that_do_not_go_together_are_told(changes: dict[str, Any], problem: str) -> None:
    given = {"pretrained_model_name_or_path": "base", "instance_prompt": "a sks fox", **changes}
    with pytest.raises(InputError) as error:
        parse_settings([f"--{name}={value}" for name, value in given.items()])
    (line,) = str(error.value).splitlines()[1:]
    assert line.startswith(f"  {problem}")
