"""What a choice of adapters comes to: the matrices that a model's layers add in a call.

An adapter is one tensor: the matrices of its layers one behind the other, (N,). So is what layers add, or (samples, N)
where each sample has its own. To choose an adapter is to take its tensor, and torch.compile sees one input. Adapters
that train, or may, are parameters instead, one a layer.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .choice import Mixture, Weight
from .config import CoeffConfig

# Held by what adds, replaces or removes adapters, from its checks to its end; taken before SWAP, never inside it.
CHANGES = threading.RLock()
SWAP = threading.RLock()  # held while adapters are replaced, and while a call takes those that it goes by


class Layout:
    """Where matrices lie in a tensor: by the number of their layer, of `sides` rows and columns."""

    def __init__(self, sides: Mapping[int, int]) -> None:
        self.sides = dict(sides)
        ends = list(itertools.accumulate((side**2 for side in sides.values()), initial=0))
        self.offsets = dict(zip(self.sides, ends))
        self.size = ends[-1]

    def split(self, flat: Tensor) -> dict[int, Tensor]:
        """Views (..., H, H) by number."""
        pieces = flat.split([side**2 for side in self.sides.values()], -1)
        return {n: piece.unflatten(-1, (side, side)) for (n, side), piece in zip(self.sides.items(), pieces)}

    def at(self, flat: Tensor, number: int) -> Tensor:
        """One of them."""
        side, offset = self.sides[number], self.offsets[number]
        matrix: Tensor = flat[..., offset : offset + side * side].unflatten(-1, (side, side))
        return matrix


class Adapter:
    """Delta of an adapter on the layers of one model: one tensor, or parameters where it trains or may.

    Args:
        config: what it was made with.
        layout: of its tensor.
        values: (N,) float32; `None` with `coeff`.
        coeff: its parameters by the number of their layer.
        elsewhere: the components of the pipeline that have it, too.
    """

    def __init__(
        self,
        config: CoeffConfig,
        layout: Layout,
        values: Tensor | None = None,
        coeff: dict[int, nn.Parameter] | None = None,
        elsewhere: tuple[str, ...] = (),
    ) -> None:
        self.config, self.layout, self.values, self.coeff, self.elsewhere = config, layout, values, coeff, elsewhere

    def delta(self, number: int) -> Tensor:
        """(H, H) of a layer: the parameter, if it has parameters."""
        return self.layout.at(self.read(), number) if self.coeff is None else self.coeff[number]

    def make_parameters(self) -> None:
        """Has it train by parameters from now on."""
        with torch.inference_mode(False):  # or else they could never be trained
            pieces = self.layout.split(self.read())
            self.coeff = {number: nn.Parameter(piece.clone()) for number, piece in pieces.items()}

    def read(self) -> Tensor:
        """Its values now, (N,), that nothing changes later."""
        if self.coeff is None:
            assert self.values is not None
            return self.values
        with SWAP, torch.inference_mode(False), torch.no_grad():
            parameters = [parameter.detach() for parameter in self.coeff.values()]
            return torch.cat([parameter.to(parameters[0].device).flatten() for parameter in parameters])

    def frozen(self) -> Adapter:
        return self if self.coeff is None else Adapter(self.config, self.layout, self.read())


class Term(NamedTuple):
    """weight * Delta of an adapter that trains, with its dropout."""

    delta: Tensor
    weight: float
    dropout: float


class Added(NamedTuple):
    """What one layer adds: a matrix (H, H) or (samples, H, H), or the sum of terms.

    Args:
        dropout: of each sample of `matrix`, in training.
    """

    matrix: Tensor | None
    terms: tuple[Term, ...] = ()
    dropout: tuple[float, ...] = ()


Terms = Sequence[tuple[Adapter, Weight]]


@dataclass(frozen=True, eq=False)
class Resolved:
    """What all layers add.

    Args:
        layout: of `flat`.
        flat: (N,), or (samples, N).
        pieces: in its place, matrices by the layer's number through which gradients reach the parameters.
        terms: in its place, adapters whose parameters the layers weigh themselves, and their weights.
        dropout: of each sample, in training.
    """

    layout: Layout | None = None
    flat: Tensor | None = None
    pieces: Mapping[int, Tensor] = field(default_factory=dict)
    terms: tuple[tuple[Adapter, Weight], ...] = ()
    dropout: tuple[float, ...] = ()

    def at(self, number: int) -> Added | None:
        """What a layer adds; `None` if it runs as in the base model."""
        if self.terms:
            terms = [
                Term(adapter.delta(number), weight_at(weight, number), adapter.config.dropout)
                for adapter, weight in self.terms
                if number in adapter.layout.sides and weight_at(weight, number) != 0.0
            ]
            return Added(None, tuple(terms)) if terms else None
        if self.pieces:
            return Added(self.pieces[number], (), self.dropout) if number in self.pieces else None
        if self.flat is None or self.layout is None or number not in self.layout.sides:
            return None
        return Added(self.layout.at(self.flat, number), (), self.dropout)

    def to(self, device: torch.device | None) -> Resolved:
        """With its tensor, if it has one, on this device; `None` is where it is."""
        if self.flat is None or device is None or self.flat.device == device:
            return self
        return Resolved(self.layout, self.flat.to(device), dropout=self.dropout)


NOTHING = Resolved()


def resolve(
    adapters: Mapping[str, Adapter], images: Sequence[Mixture], times: int = 0, scale: float = 1.0, live: bool = False
) -> Resolved:
    """sum_k weight_k Delta_k of one mixture for all samples, or of one for each image.

    Args:
        adapters: names that are not among them count for nothing: their adapters are on other models.
        images: one mixture, if `times` is 0.
        times: how often the batch repeats the images.
        scale: a factor on all.
        live: whether adapters that train take part by their parameters.
    """
    terms = {
        image: [
            (adapters[name], weight)
            for name, weight in image
            if name in adapters and (any(weight) if isinstance(weight, tuple) else weight != 0.0)
        ]
        for image in dict.fromkeys(images)
    }
    if not any(terms.values()):
        return NOTHING
    live = live and any(adapter.coeff is not None for used in terms.values() for adapter, _ in used)
    if times:
        rates = tuple(max((adapter.config.dropout for adapter, _ in terms[image]), default=0.0) for image in images)
        rows = [terms[image] for image in images]
        return (_rows_live if live else _rows)(rows, times, scale, rates * times)
    if live:
        return Resolved(terms=tuple((adapter, _times(scale, weight)) for adapter, weight in terms[images[0]]))
    flat, layout = _sum(terms[images[0]], scale)
    return Resolved(layout, flat)


def _times(scale: float, weight: Weight) -> Weight:
    return tuple(scale * w for w in weight) if isinstance(weight, tuple) else scale * weight


def weight_at(weight: Weight, number: int) -> float:
    """Of the layer of this number; 1 for layers that came later."""
    if isinstance(weight, tuple):
        return weight[number] if number < len(weight) else 1.0
    return weight


def _sum(terms: Terms, scale: float) -> tuple[Tensor, Layout]:
    """The adapters' weighted sum, and the layers that any of them has with a weight that is not 0."""
    first = terms[0][0].layout
    if all(adapter.layout is first and not isinstance(weight, tuple) for adapter, weight in terms):
        weighed = [_weighed(adapter.read(), scale * weight) for adapter, weight in terms]  # type: ignore[operator]
        return _added_up(weighed), first
    by_layer: dict[int, list[Tensor]] = {}
    for adapter, weight in terms:
        for number, delta in adapter.layout.split(adapter.read()).items():
            if weight_at(weight, number) != 0.0:
                by_layer.setdefault(number, []).append(scale * weight_at(weight, number) * delta)
    layout = Layout({number: len(deltas[0]) for number, deltas in by_layer.items()})
    sums = [_added_up(deltas).flatten() for deltas in by_layer.values()]
    return torch.cat([delta.to(sums[0].device) for delta in sums]), layout


def _added_up(terms: Sequence[Tensor]) -> Tensor:
    return torch.stack([term.to(terms[0].device) for term in terms]).sum(0) if len(terms) > 1 else terms[0]


def _weighed(values: Tensor, weight: float) -> Tensor:
    return values if weight == 1.0 else weight * values


def _rows(images: Sequence[Terms], times: int, scale: float, dropout: tuple[float, ...]) -> Resolved:
    """A row for each sample."""
    sums = [_sum(terms, scale) if terms else None for terms in images]
    some = next(found for found in sums if found is not None)
    layouts = {id(found[1]): found[1] for found in sums if found is not None}
    layout = some[1]
    if len(layouts) > 1:
        layout = Layout({number: side for other in layouts.values() for number, side in other.sides.items()})
    rows = some[0].new_zeros(len(images), layout.size)
    for row, found in zip(rows, sums):
        if found is not None and found[1] is layout:
            row.copy_(found[0])
        elif found is not None:
            views = layout.split(row)
            for number, delta in found[1].split(found[0]).items():
                views[number].copy_(delta)
    return Resolved(layout, rows.repeat(times, 1), dropout=dropout)


def _rows_live(images: Sequence[Terms], times: int, scale: float, dropout: tuple[float, ...]) -> Resolved:
    """The same, with a graph from each layer's matrices to the parameters."""
    used = dict.fromkeys(adapter for terms in images for adapter, _ in terms)
    sides = {number: side for adapter in used for number, side in adapter.layout.sides.items()}
    pieces = {}
    for number, side in sides.items():
        deltas = {adapter: adapter.delta(number) for adapter in used if number in adapter.layout.sides}
        zeros = next(iter(deltas.values())).new_zeros(side, side)
        rows = [[scale * w * deltas[adapter] for adapter, w in terms if adapter in deltas] for terms in images]  # type: ignore[operator]
        pieces[number] = torch.stack([_added_up(row) if row else zeros for row in rows]).repeat(times, 1, 1)
    return Resolved(pieces=pieces, dropout=dropout)


def joined(values: Sequence[Tensor]) -> Tensor:
    """All numbers in one (N,), not to be written to: those that lie one after another are not copied."""
    first = values[0]
    begin = end = first.data_ptr()
    for value in values:
        if value.data_ptr() != end or value.dtype != first.dtype or not value.is_contiguous():
            break
        end += value.nbytes
    else:
        left = first.untyped_storage().nbytes() - first.storage_offset() * first.itemsize
        if end - begin <= left:  # they are no neighbours by chance
            return first.detach().as_strided(((end - begin) // first.itemsize,), (1,))
    return torch.cat([value.reshape(-1) for value in values]).detach()
