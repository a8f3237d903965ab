"""Which adapters take part in a call: what the call says itself, else its thread or asyncio task, else the model.

A choice is a value: nothing changes it, and whoever holds one goes on with it.

    pipe(prompts, cross_attention_kwargs={"coeff": ["dog", None, {"dog": 0.5, "cat": 0.5}], "coeff_scale": 0.8})
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from numbers import Real
from typing import Any

KEY = "coeff"
SCALE = "coeff_scale"
FORMS = (
    "a name ('dog'), None (the base model), a name with its weight (('dog', 0.8)), names with their weights "
    "({'dog': 0.5, 'cat': 0.5}), or a list of these, one for each prompt or image"
)

Weight = float | tuple[float, ...]  # of all layers, or of each by its number
Mixture = tuple[tuple[str, Weight], ...]  # the adapters of an image, and their weights; none for the base model


@dataclass(frozen=True)
class Choice:
    """A mixture for all images of a call, or one for each of its prompts or images."""

    mixtures: tuple[Mixture, ...]
    per_image: bool = False

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(name for mixture in self.mixtures for name, _ in mixture))


BASE = Choice(((),))


def read_choice(given: Any) -> Choice:
    """The choice that the attention kwargs of a call state.

    Raises:
        ValueError: if it is none of the forms.
    """
    if not isinstance(given, list):
        return Choice((_mixture(given),))
    if not given:
        raise ValueError(
            f"{KEY} must have an entry for each prompt or image, got an empty list; None is the base model"
        )
    return Choice(tuple(_mixture(entry) for entry in given), per_image=True)


def _mixture(form: Any) -> Mixture:
    pair = isinstance(form, tuple) and len(form) == 2 and isinstance(form[0], str)
    if form is None:
        return ()
    if isinstance(form, str):
        return ((form, 1.0),)
    if not pair and not (isinstance(form, Mapping) and form):
        raise ValueError(f"{KEY} must be {FORMS}; got {form!r}")
    weights = (form,) if pair else form.items()
    for name, weight in weights:
        if not isinstance(name, str) or not isinstance(weight, Real) or not math.isfinite(weight):
            raise ValueError(f"{KEY} must give names finite numbers as weights, got {name!r}: {weight!r} in {form!r}")
    return tuple((name, float(weight)) for name, weight in weights)


def checked_scale(scale: Any) -> float:
    """Raises ValueError if it is not a finite number."""
    if isinstance(scale, str) or not math.isfinite(scale):
        raise ValueError(f"{SCALE} must be a finite number, got {scale!r}")
    return scale  # type: ignore[no-any-return]


def without_choice(kwargs: dict[str, Any]) -> tuple[list[Any], Any, dict[str, Any]]:
    """What a model's kwargs state: of adapters ([] for nothing), as a factor; and the kwargs without it."""
    for name, given in kwargs.items():
        if name.endswith("attention_kwargs") and given is not None and (KEY in given or SCALE in given):
            left = {key: value for key, value in given.items() if key not in (KEY, SCALE)}
            stated = [given[KEY]] if KEY in given else []
            return stated, given.get(SCALE), {**kwargs, name: left or None}
    return [], None, kwargs


@dataclass(frozen=True, eq=False)
class Entry:
    """A choice that a thread or an asyncio task has entered, for the records of one model or pipeline."""

    model: Any
    records: tuple[Any, ...]
    choice: Choice


_entries: ContextVar[tuple[Entry, ...]] = ContextVar("coeff_choices", default=())


@contextmanager
def entered(model: Any, records: tuple[Any, ...], choice: Choice) -> Iterator[Entry]:
    """Inside, this choice holds for the thread or task that entered; left in any order, it leaves the others'."""
    entry = Entry(model, records, choice)
    try:
        _entries.set((*_entries.get(), entry))
        yield entry
    finally:
        try:
            _leave(entry)
        except BaseException:  # interrupted
            _leave(entry)
            raise


def _leave(entry: Entry) -> None:
    _entries.set(tuple(other for other in _entries.get() if other is not entry))


def entry_of(record: Any) -> Entry | None:
    """What was entered last for this record, here."""
    return next((entry for entry in reversed(_entries.get()) if record in entry.records), None)


def is_entered(entry: Entry) -> bool:
    return entry in _entries.get()
