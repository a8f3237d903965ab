"""Coefficient files as a stranger may make them. Each is made from a good one by a seed: the same again on demand."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

Header = dict[str, Any]


class Good:
    """A file that loads, in its parts."""

    def __init__(self, data: bytes) -> None:
        length = int.from_bytes(data[:8], "little")
        self.data, self.values = data, data[8 + length :]
        self._header = data[8 : 8 + length].decode()

    def header(self) -> Header:
        header: Header = json.loads(self._header)
        return header

    def description(self) -> Header:
        description: Header = json.loads(self.header()["__metadata__"]["coeff_diffusers"])
        return description


def join(header: Header | str | bytes, values: bytes) -> bytes:
    text = json.dumps(header) if isinstance(header, dict) else header
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return len(raw).to_bytes(8, "little") + raw + values


def make(good: Good, folder: Path, seed: int, index: int) -> tuple[str, Path]:
    """Puts mutant `index` into the empty `folder`. Returns what was done to it, and its path."""
    rng = random.Random(f"{seed}:{index}")
    kind = KINDS[index % len(KINDS)]
    path = folder / rng.choice([f"mutant{index}.safetensors"] * 9 + [f"mutant{index}\n\x1b[31m'\".safetensors"])
    made = kind(rng, good, path)
    if made is not None:
        path.write_bytes(made)
    return kind.__name__, path


def flipped_bits(rng: random.Random, good: Good, path: Path) -> bytes:
    data = bytearray(good.data)
    end = rng.choice([8, len(data) - len(good.values), len(data)])
    for _ in range(rng.choice([1, 1, 2, 8])):
        data[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(data)


def truncated(rng: random.Random, good: Good, path: Path) -> bytes:
    return good.data[: rng.choice([rng.randrange(12), rng.randrange(len(good.data)), len(good.data) - 1])]


def longer(rng: random.Random, good: Good, path: Path) -> bytes:
    if rng.random() < 0.5:
        return good.data + rng.randbytes(rng.choice([1, 8, 4096]))
    return rng.randbytes(rng.choice([0, 1, 7, 8, 9, 200, 70_000]))


def lies_on_its_length(rng: random.Random, good: Good, path: Path) -> bytes:
    length = len(good.data) - len(good.values) - 8
    lie = rng.choice([0, 1, length - 1, length + 1, len(good.data), 100_000_001, 2**31, 2**63, 2**64 - 1])
    return lie.to_bytes(8, "little") + good.data[8:]


NUMBERS: list[Any] = [-1, 0, 1, 2, 3, 5, 2**31, 2**63, 2**64, 10**400, 1.0, 1e999, True, None, "4", [4], {}]


def other_offsets(rng: random.Random, good: Good, path: Path) -> bytes:
    header = good.header()
    keys = [key for key in header if key != "__metadata__"]
    one, other = rng.sample(keys, 2)
    how = rng.randrange(5)
    if how == 0:
        header[one]["data_offsets"] = header[other]["data_offsets"]
    elif how == 1:
        header[one]["data_offsets"], header[other]["data_offsets"] = (
            header[other]["data_offsets"],
            header[one]["data_offsets"],
        )
    elif how == 2:
        header[one]["data_offsets"][rng.randrange(2)] = rng.choice(NUMBERS)
    elif how == 3:
        del header[one]  # a hole, or values at the end that nothing names
    else:
        header[one]["data_offsets"] = [n + rng.choice([-4, -1, 1, 4]) for n in header[one]["data_offsets"]]
    return join(header, good.values)


def other_shapes(rng: random.Random, good: Good, path: Path) -> bytes:
    header = good.header()
    key = rng.choice([key for key in header if key != "__metadata__"])
    shape = header[key]["shape"]
    shapes = [[shape[0] ** 2], [1, *shape], [shape[0] ** 2, 1], [], [9] * 90_000, [0, 0], rng.choice(NUMBERS)]
    header[key]["shape"] = rng.choice([*shapes, [rng.choice(NUMBERS), rng.choice(NUMBERS)], [20_000, 20_000]])
    return join(header, good.values)


def other_types(rng: random.Random, good: Good, path: Path) -> bytes:
    header = good.header()
    keys = [key for key in header if key != "__metadata__"]
    types: list[Any] = [
        "F8_E4M3",
        "F8_E5M2",
        "I32",
        "U8",
        "BOOL",
        "C64",
        "F16",
        "BF16",
        "F64",
        "f32",
        "",
        4,
        None,
        ["F32"],
    ]
    dtype = rng.choice(types)
    for key in rng.sample(keys, rng.choice([1, len(keys)])):
        header[key]["dtype"] = dtype
    return join(header, good.values)


def other_values(rng: random.Random, good: Good, path: Path) -> bytes:
    import torch
    from safetensors.torch import load, save

    tensors = load(good.data)
    for key in rng.sample(sorted(tensors), rng.choice([1, 3, len(tensors)])):
        dtype = rng.choice([torch.float64, torch.float32, torch.float16, torch.bfloat16])
        tensors[key] = tensors[key].to(dtype)
        value = rng.choice(
            [None, None, 0.0, -0.0, 1e-45, 9999.0, 10001.0, 65504.0, 1e18, 3e38, 1e300, 1e999, float("nan")]
        )
        if value is not None:
            tensors[key][0, rng.randrange(2)] = value if abs(value) < torch.finfo(dtype).max else float("inf")
    return save(tensors, good.header()["__metadata__"])


TEXTS = [
    "",
    ".",
    "..",
    "../../x",
    "\x1b[2J\x1b[31m",
    "a\nok: it fits",
    "\r",
    "\x00",
    "\u202e",
    "\ud800",
    "狐",
    "x" * 90_000,
    "$\\frac{$",
]


def other_names(rng: random.Random, good: Good, path: Path) -> bytes:
    header, text = good.header(), rng.choice(TEXTS)
    keys = [key for key in header if key != "__metadata__"]
    how = rng.randrange(4)
    if how == 0:
        key = rng.choice(keys)
        header = {(text if k == key else k): v for k, v in header.items()}
    elif how == 1:
        key = rng.choice(keys)
        new = f"unet.{text}.coeff"
        description = good.description()
        heads = description["base"]["unet"]["heads"]
        heads[text] = heads.pop(key.removeprefix("unet.").removesuffix(".coeff"))
        header = {(new if k == key else k): v for k, v in header.items()}
        header["__metadata__"]["coeff_diffusers"] = json.dumps(description)
    elif how == 2:
        header["__metadata__"][rng.choice([text, "instance_prompt", "modelspec.title"])] = text
    else:
        description = good.description()
        description["base"]["unet"][rng.choice(["name", "class"])] = text
        description["versions"] = {text: text}
        header["__metadata__"]["coeff_diffusers"] = json.dumps(description)
    return join(header, good.values)


def twice(rng: random.Random, good: Good, path: Path) -> bytes:
    """A key twice: of a tensor, of the metadata, of the description, in the text of its JSON."""
    header = good.header()
    key = rng.choice([key for key in header if key != "__metadata__"])
    how = rng.randrange(4)
    if how == 0:
        text = json.dumps(header)
        return join(f'{{"{key}": {json.dumps(header[key])}, {text[1:]}', good.values)
    if how == 1:
        text = json.dumps(header)
        return join(text.replace('"format": "pt"', '"format": "pt", "format": "pt"'), good.values)
    if how == 2:
        return join("{" + '"a": 0, ' * 90_000 + json.dumps(header)[1:], good.values)
    inner = header["__metadata__"]["coeff_diffusers"]
    header["__metadata__"]["coeff_diffusers"] = inner.replace('"base":', '"base": {}, "base":', 1)
    return join(header, good.values)


JUNK: list[Any] = [None, True, 0, 1, -1, 1.0, 5, "", "1", "unet", [], {}, ["x"], [[]], {"unet": 5}, {"": {}}, 10**400]


def other_description(rng: random.Random, good: Good, path: Path) -> bytes:
    """A value anywhere in the description is another, or not there, or there is one more."""
    header, description = good.header(), good.description()
    at: Any = description
    while True:
        key = rng.choice(sorted(at))
        if not isinstance(at[key], dict) or not at[key] or rng.random() < 0.3:
            break
        at = at[key]
    how = rng.randrange(4)
    if how == 0:
        del at[key]
    elif how == 1:
        at[rng.choice(["x", "unet", "vae", "class", "heads"])] = rng.choice(JUNK)
    else:
        at[key] = rng.choice(JUNK)
    header["__metadata__"]["coeff_diffusers"] = json.dumps(description)
    return join(header, good.values)


def other_json(rng: random.Random, good: Good, path: Path) -> bytes:
    """Deep, huge, or no JSON, as the header or as the description in it."""
    header = good.header()
    deep = rng.choice(["[", '{"a":']) * rng.choice([500, 100_000])
    text = rng.choice([deep, deep + "0", "[" * 900 + "]" * 900, "[" + "{}," * 300_000 + "{}]", "1" * 5000, "NaN", "5",
                       "null", '"x"', "[]", "{}", "\ufeff{}", '{"format_version": NaN}', '{"format_version": 1e999}',
                       '{"format_version": true, "base": {}}', '{"format_version": "1", "base": {}}',
                       '{"format_version": 1.0, "base": {}}', '{"format_version": 2}', " " * 2_000_000])  # fmt: skip
    if rng.random() < 0.3:
        return join(text, good.values)
    header["__metadata__"]["coeff_diffusers"] = text
    if rng.random() < 0.2:
        header["__metadata__"] = rng.choice(JUNK)
    encoding = "utf-16" if rng.random() < 0.1 else "utf-8"
    return join(json.dumps(header).encode(encoding), good.values)


def special(rng: random.Random, good: Good, path: Path) -> None:
    """What is no regular file, or a sparse one of a gigabyte and a half."""
    how = rng.randrange(7)
    if how == 0:
        os.mkfifo(path)
    elif how == 1:
        path.mkdir()
        (path / "x.safetensors").mkdir()
    elif how == 2:
        path.symlink_to(path.name)
    elif how == 3:
        path.symlink_to(rng.choice(["/dev/zero", "/dev/null", "/dev/tty", "/nowhere"]))
    elif how == 4:
        path.touch()
    else:
        header = good.header()
        header["unet.extra.coeff"] = {"dtype": "F32", "shape": [20_000, 20_000], "data_offsets": [0, 1_600_000_000]}
        header["unet.extra.coeff"]["data_offsets"] = [len(good.values), len(good.values) + 1_600_000_000]
        with open(path, "wb") as file:
            file.write(join(header, good.values) if how == 5 else good.data)
            file.truncate(file.tell() + 1_600_000_000)


def harmless(rng: random.Random, good: Good, path: Path) -> bytes:
    """Another way to write what loads."""
    header = good.header()
    items = list(header.items())
    rng.shuffle(items)
    header = dict(items)
    header["__metadata__"]["note"] = rng.choice(["", "a\nb", "狐", "x" * 1000])
    return join(json.dumps(header, ensure_ascii=rng.random() < 0.5) + " " * rng.randrange(9), good.values)


KINDS: list[Callable[[random.Random, Good, Path], bytes | None]] = [
    flipped_bits,
    truncated,
    other_description,
    longer,
    lies_on_its_length,
    other_offsets,
    other_shapes,
    other_types,
    other_values,
    other_names,
    twice,
    other_description,
    other_json,
    special,
    harmless,
    flipped_bits,
]
