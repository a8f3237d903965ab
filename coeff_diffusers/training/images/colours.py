"""Images whose colour profile gives their numbers another meaning, in sRGB, which diffusion models know."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # colour space of a profile -> mode of the images it is for
SAME = 2  # of 255: by so much do profiles of sRGB differ from one another


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """In RGB, or RGBA if something is transparent; the image itself if the profile changes nothing or is useless."""
    try:
        transform = srgb_transform(profile, _plain_mode(image)) if profile else None
    except ValueError:  # open_images has said so
        transform = None
    if transform is None:
        return image
    transparent = image.mode.endswith("A") or "transparency" in image.info
    alpha = image.convert("RGBA").getchannel("A") if transparent else None
    converted = transform.apply(image.convert(transform.input_mode))
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def changes_colours(image: Image.Image) -> bool:
    """Whether the image has a profile that gives its numbers another meaning. Raises as [`srgb_transform`]."""
    profile = image.info.get("icc_profile", b"")
    if profile is None:  # which Pillow says of a JPEG
        raise ValueError("parts of it are missing")
    return bool(profile) and srgb_transform(profile, _plain_mode(image)) is not None


def _plain_mode(image: Image.Image) -> str:
    """What the image is, its palette and its transparency apart."""
    if image.mode in ("1", "L", "LA") or image.mode.startswith("I"):
        return "L"
    return "RGB" if image.mode.startswith(("RGB", "P")) else image.mode


@lru_cache(maxsize=64)
def srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile's colours to sRGB; `None` if they are the same.

    Raises:
        ValueError: if it is no profile, or none for images of this mode.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space
        if mode == "L" and space == "RGB ":  # grey is one of its colours
            mode = "RGB"
        if MODES.get(space) != mode:
            raise ValueError(f"it is for {space.strip()}, and the image is in {mode}")
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ImportError) as error:  # the last where Pillow has no LittleCMS
        raise ValueError(str(error)) from error
    samples = _samples(mode)
    before, after = (np.asarray(image, dtype=int) for image in (samples.convert("RGB"), transform.apply(samples)))
    return None if abs(before - after).max() <= SAME else transform


def _samples(mode: str) -> Image.Image:
    """Colours from all over the space."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    steps = {1: 256, 3: 16, 4: 6}[channels]
    grid = np.stack(np.meshgrid(*[np.linspace(0, 255, steps)] * channels), axis=-1).astype(np.uint8)
    return Image.frombytes(mode, (grid[..., 0].size, 1), grid.tobytes())
