"""Reading a coefficient file, which comes from a stranger: everything is checked before anything of it is used.

The file is opened once. Its header is judged before a value is read, and each value is read once, into memory of its
own: what is done to the file meanwhile changes nothing that was checked. checkpoint.py says what is in a file.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .files import printable
from .resolved import joined

FORMAT_VERSION = 1
MAX_FILE_BYTES = 2**28
MAX_HEADER_BYTES = 2**20  # what its JSON takes when it is read may be some 30 times as much
MAX_HEADS = 1024
MAX_VALUE = 1e4  # trained coefficients stay below 10; far above it attention overflows

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_KINDS = {
    stat.S_IFDIR: "folder",
    stat.S_IFIFO: "named pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


def read_file(path: Path, values: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The values (none with `values=False`) and the header of a coefficient file, its JSON entry read.

    Raises:
        ValueError: if it is none, or larger than it may be, or written by a newer release.
        OSError: if it cannot be opened.
    """
    with _open(path) as file:
        try:
            entries, metadata = _header(file)
            tensors = _values(file, entries) if values and entries else {}
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{printable(path)} is no readable .safetensors file: {_reason(error)}") from error
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
    if "coeff_diffusers" not in metadata:
        raise ValueError(f"{printable(path)} is no coefficient file: its header has no 'coeff_diffusers' entry")
    try:
        description = _parse(metadata["coeff_diffusers"])
        version = _checked_version(description)
        if version == FORMAT_VERSION:
            _check_description(description)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{printable(path)}: the header's 'coeff_diffusers' entry cannot be read: {_reason(error)}"
        ) from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{printable(path)} has format version {short(version)}, this release reads {FORMAT_VERSION}: "
            "update the package"
        )
    return tensors, {**metadata, "coeff_diffusers": description}


def all_usable(state_dict: Mapping[str, Any]) -> bool:
    """Whether [`value_problem`] and [`too_large`] find nothing in any value, by one look at all."""
    values = list(state_dict.values())
    if not values or any(_kind_problem(delta) for delta in values) or len({delta.device for delta in values}) > 1:
        return False
    return bool((joined(values).abs() <= MAX_VALUE).all())


def value_problem(delta: Any) -> str | None:
    """Why a state dict's value cannot be coefficients, whatever layer they are for; `None` if it can."""
    if problem := _kind_problem(delta):
        return problem
    # as it is used: a finite float64 may be none in float32
    not_finite = int((~torch.isfinite(delta.detach().to(torch.float32))).sum())
    return f"has {not_finite} values that are not finite" if not_finite else None


def _kind_problem(delta: Any) -> str | None:
    if not isinstance(delta, Tensor):
        return f"must be a tensor, got {type(delta).__name__}"
    if delta.is_meta or delta.is_nested or delta.layout != torch.strided:
        return f"must be a dense tensor with values, got {'meta' if delta.is_meta else delta.layout}"
    if delta.dtype not in DTYPES.values():
        return f"must be floating point ({', '.join(map(str, DTYPES.values()))}), got {delta.dtype}"
    return None


def too_large(delta: Tensor) -> str | None:
    """What is wrong with finite values that no training gives; `None` for others."""
    largest = float(delta.detach().abs().max()) if delta.numel() else 0.0
    return f"has values up to {largest:.3g}, more than {MAX_VALUE:,.0f}" if largest > MAX_VALUE else None


def _open(path: Path) -> BinaryIO:
    """Opens a regular file, and nothing that waits, or does something, when it is opened."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    _check_regular(path, os.stat(path).st_mode)
    file: BinaryIO = open(path, "rb", opener=opener)  # noqa: SIM115
    try:
        _check_regular(path, os.fstat(file.fileno()).st_mode)  # it may be another by now
    except BaseException:
        file.close()
        raise
    return file


def _check_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise ValueError(f"{printable(path)} is a {_KINDS.get(stat.S_IFMT(mode), 'special file')}, no file to be read")


Entry = tuple[str, list[int], int]  # dtype, shape, bytes


def _header(file: BinaryIO) -> tuple[dict[str, Entry], dict[str, str]]:
    """What the header says of each value, in the order in which they lie in the file; and its metadata."""
    size = os.fstat(file.fileno()).st_size
    if size > MAX_FILE_BYTES:
        raise ValueError(f"it has {size:,} bytes, and coefficients at most {MAX_FILE_BYTES:,}")
    length = int.from_bytes(_read(file, 8), "little")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"its header has {length:,} bytes, and that of coefficients at most {MAX_HEADER_BYTES:,}")
    text = _read(file, length).decode()
    if not text.startswith("{"):
        raise ValueError("its header is no JSON object")
    header = _parse(text)
    metadata = header.pop("__metadata__", {})
    if not _is(metadata, dict) or not all(_is(value, str) for value in metadata.values()):
        raise ValueError("its metadata must be strings")
    entries = [(key, *_checked_entry(key, entry)) for key, entry in header.items()]
    entries.sort(key=lambda entry: entry[3])
    at = 0
    for key, _, _, begin, end in entries:
        if begin != at:
            raise ValueError(f"{key}: begins at byte {begin} of the values, where byte {at} comes next")
        at = end
    if at != size - 8 - length:
        raise ValueError(f"its values take {at:,} bytes, and there are {size - 8 - length:,}")
    return {key: (dtype, shape, end - begin) for key, dtype, shape, begin, end in entries}, metadata


def _checked_entry(key: str, entry: Any) -> tuple[str, list[int], int, int]:
    """dtype, shape, first and last byte of a value, as the header says."""
    if not key.isprintable():
        raise ValueError(f"{key!r} is the name of no layer")
    if not _is(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{key}: must be described by dtype, shape and data_offsets, got {short(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _is(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{key}: has the type {short(dtype)}; {', '.join(DTYPES)} are read")
    if not (_is_pair(shape) and min(shape) >= 1 and max(shape) <= MAX_HEADS):
        raise ValueError(f"{key}: must have two dimensions from 1 to {MAX_HEADS:,}, got {short(shape)}")
    if not (_is_pair(offsets) and min(offsets) >= 0):
        raise ValueError(f"{key}: must have two offsets of bytes, got {short(offsets)}")
    begin, end = offsets
    if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{key}: {short(shape)} of {dtype} do not fill the bytes from {begin} to {end}")
    return dtype, shape, begin, end


def _values(file: BinaryIO, entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    counts = [count for _, _, count in entries.values()]
    body = torch.frombuffer(bytearray(_read(file, sum(counts))), dtype=torch.uint8)
    return {
        key: _aligned(part, DTYPES[dtype]).view(shape)
        for part, (key, (dtype, shape, _)) in zip(body.split(counts), entries.items())
    }


def _aligned(part: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as numbers of a type, which may not begin anywhere in memory."""
    return (part.clone() if part.storage_offset() % dtype.itemsize else part).view(dtype)


def _read(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise ValueError("it ends before what its header says")
    return data


def _parse(text: str) -> Any:
    """JSON of the strict kind: no key twice, no NaN or Infinity, no half of a surrogate pair."""
    value = json.loads(text, object_pairs_hook=_object)
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    once = dict(pairs)
    if len(once) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"{short(key)} is there twice")
    return once


def _reason(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def _is(value: Any, kind: type) -> bool:
    return type(value) is kind  # True is no int here


def _is_pair(value: Any) -> bool:
    """Of integers."""
    return _is(value, list) and [*map(type, value)] == [int, int]


# The description: what a header's `coeff_diffusers` entry must be. Entries that are not named here are let through.


def _checked_version(description: Any) -> int:
    if not _is(description, dict):
        raise ValueError(f"it must be an object, got {short(description)}")
    version = description.get("format_version")
    if not _is(version, int) or version < 1:
        raise ValueError(f"format_version must be the number {FORMAT_VERSION}, got {short(version)}")
    return int(version)


def _check_description(description: Mapping[str, Any]) -> None:
    for name in ("config", "versions", "made_from"):
        if not _is(description.get(name, {}), dict) and description[name] is not None:
            raise ValueError(f"{name} must be an object, got {short(description[name])}")
    base = description.get("base")
    if not _is(base, dict) or not base:
        raise ValueError(f"base must be an object with a component, got {short(base)}")
    for component, said in base.items():
        where = f"base.{short(component)}"
        if not component.isidentifier() or not _is(said, dict):
            raise ValueError(f"{where} must be a component's name with an object, got {short(said)}")
        if not _is(said.get("class"), str) or not said["class"].isidentifier():
            raise ValueError(f"{where}.class must be the name of a class, got {short(said.get('class'))}")
        for name in ("name", "quantization"):
            if not _is(said.get(name, ""), str):
                raise ValueError(f"{where}.{name} must be a string, got {short(said[name])}")
        heads = said.get("heads")
        if not _is(heads, dict):
            raise ValueError(f"{where}.heads must be an object, got {short(heads)}")
        for layer, count in heads.items():
            if not layer.isprintable() or not _is(count, int) or not 1 <= count <= MAX_HEADS:
                raise ValueError(
                    f"{where}.heads must give layers from 1 to {MAX_HEADS:,} heads, got {short(count)} for {layer!r}"
                )
