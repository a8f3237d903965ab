"""Lets requests of one kind through to `serve.batch`, as many as its next batch can hold.

`serve.batch` makes up batches while one is running: whoever comes then, and is alone for `batch_wait_timeout_s`, gets
a batch of one, seconds before its turn; and it asks nobody whether requests go together. So they wait outside. When
the pipeline is free, the one that has waited longest goes through, and those of its kind with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Hashable, Iterator
from contextlib import asynccontextmanager, contextmanager


class Place:
    """Of a request that waits, or takes part in a batch. `gone`: nobody waits for its images any more."""

    def __init__(self, kind: Hashable, images: int) -> None:
        self.kind, self.images = kind, images
        self.turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.gone = False


class Door:
    """Of one event loop.

    Args:
        most: images of a batch.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._outside: list[Place] = []  # in the order they came
        self._inside: list[Place] = []
        self._running = False
        self._joinable = True  # a batch has not begun since the door was opened for its kind

    @property
    def waiting(self) -> int:
        """Requests outside."""
        return len(self._outside)

    @asynccontextmanager
    async def through(self, kind: Hashable, images: int) -> AsyncIterator[Place]:
        """Waits for the request's turn. Inside, it takes part in a batch.

        Args:
            kind: what requests of one batch have in common.
            images: at most as many as a batch has.
        """
        place = Place(kind, images)
        self._outside.append(place)
        self._let_in()
        try:
            await place.turn
            yield place
        except BaseException:  # the client went away, say
            place.gone = True
            raise
        finally:
            for places in (self._outside, self._inside):
                if place in places:
                    places.remove(place)
            self._let_in()

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Of a batch that is running: nobody comes in that would be too late for it."""
        self._running, self._joinable = True, False
        try:
            yield
        finally:
            self._running = False
            self._let_in()

    def _let_in(self) -> None:
        if not (self._running or self._inside):
            self._joinable = True
        if not (self._joinable and self._outside):
            return
        kind = (self._inside or self._outside)[0].kind
        for place in [place for place in self._outside if place.kind == kind]:
            if sum(each.images for each in self._inside) + place.images > self.most:
                return
            self._outside.remove(place)
            self._inside.append(place)
            if not place.turn.done():
                place.turn.set_result(None)
