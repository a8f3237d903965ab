"""The types that settings have: what a value must be stands beside the field it is about, and pydantic checks it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, TypeVar

from PIL import ImageColor
from pydantic import AfterValidator, AllowInfNan, BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

T = TypeVar("T")
Size = tuple[int, int]  # height and width in pixels
WORDS = {  # of --augment, for photographs
    "small": "far away",
    "large": "close up",
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
}
KINDS = {
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "finite_number": "a finite number",
}


def _holds(rule: str, test: Callable[[Any], bool], value: T) -> T:
    if not test(value):
        raise PydanticCustomError("rule", "{rule}", {"rule": rule})
    return value


def within(rule: str, test: Callable[[Any], bool]) -> AfterValidator:
    """A value that passes the test. `rule` is said of one that does not: "must be {rule}, got ..."."""
    return AfterValidator(partial(_holds, rule, test))


def _as_text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _as_number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, str | int):
        return value
    try:
        return float(value)  # 1e-4 is text in YAML, which wants 1.0e-4
    except (ValueError, OverflowError):
        raise PydanticCustomError("float_type", "a number") from None


def _as_several(value: Any) -> Any:
    """A value that stands alone is one of several."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _is_colour(text: str) -> bool:
    try:
        return bool(ImageColor.getrgb(text))
    except ValueError:
        return False


def parse_buckets(text: str | None) -> tuple[Size, ...]:
    """`"512,768;768,512"`, of heights and widths; `None` has none. Raises ValueError."""
    if text is None:
        return ()
    pairs = [re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", part) for part in text.split(";")]
    sizes = [(int(pair[1]), int(pair[2])) for pair in pairs if pair]
    if len(sizes) < len(pairs) or any(min(size) < 1 for size in sizes):
        raise ValueError(f"must be heights and widths such as '512,768;768,512', got {text!r}")
    if len(set(sizes)) < len(sizes):
        raise ValueError(f"must name each size once, got {text!r}")
    return tuple(sizes)


def parse_words(texts: Sequence[str]) -> dict[str, str]:
    """`WORDS`, changed by `small=tiny` and the like. Raises ValueError."""
    pairs = [text.partition("=") for text in texts]
    wrong = [text for text, (name, _, words) in zip(texts, pairs) if name not in WORDS or not words.strip()]
    if wrong:
        raise ValueError(f"must be of {', '.join(f'{name}=WORDS' for name in WORDS)}, got {', '.join(wrong)}")
    return WORDS | {name: words.strip() for name, _, words in pairs}


def _are_words(texts: tuple[str, ...]) -> tuple[str, ...]:
    try:
        parse_words(texts)
    except ValueError as error:
        raise PydanticCustomError("whole", "{problem}", {"problem": str(error)}) from None
    return texts


def _is_buckets(text: str) -> str:
    try:
        parse_buckets(text)
    except ValueError as error:
        raise PydanticCustomError("whole", "{problem}", {"problem": str(error)}) from None
    return text


Text = Annotated[str, BeforeValidator(_as_text)]
Several = BeforeValidator(_as_several)
Folder = Annotated[Text, within("the name of a folder", lambda value: bool(value.strip()))]
Texts = Annotated[tuple[str, ...], Several]
Colour = Annotated[str, within("a colour such as white or #ffffff", _is_colour)]
Buckets = Annotated[str, AfterValidator(_is_buckets)]
Words = Annotated[Texts, AfterValidator(_are_words)]

Count = Annotated[int, within("at least 1", lambda value: value >= 1)]
WholeNumber = Annotated[int, within("0 or more", lambda value: value >= 0)]
Seed = Annotated[int, within("in [0, 2^32 - 1]", lambda value: 0 <= value < 2**32)]  # what numpy takes

Number = Annotated[float, BeforeValidator(_as_number), AllowInfNan(False)]
Positive = Annotated[Number, within("above 0", lambda value: value > 0)]
NotNegative = Annotated[Number, within("0 or more", lambda value: value >= 0)]
Fraction = Annotated[Number, within("in [0, 1)", lambda value: 0 <= value < 1)]


def adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind, config=ConfigDict(strict=True))


def problems_of(error: ValidationError) -> list[tuple[bool, str]]:
    """Of each value that fails: whether it is of another type, and what must be instead."""
    found = []
    for each in error.errors(include_url=False):
        kind, value = each["type"], each["input"]
        if kind == "whole":
            found.append((False, each["msg"]))
        elif kind == "literal_error":
            choices = each["ctx"]["expected"].replace(" or ", ", ").replace("'", "")
            found.append((False, f"must be of {choices}, got {value}"))
        elif kind == "rule":
            found.append((False, f"must be {each['msg']}, got {value!r}"))
        else:
            quoted = (
                "; yes, no, on and off are text in quotes" if kind == "string_type" and isinstance(value, bool) else ""
            )
            found.append((kind != "finite_number", f"must be {KINDS[kind]}, got {value!r}{quoted}"))
    return found
