"""How the Triton kernels divide their work: one table, by the GPU's architecture and by heads and head width."""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Rows and keys of a tile, warps of a program, stages of its loop, and tiles that a program takes one by one."""

    rows: int
    keys: int
    warps: int
    stages: int
    tiles: int = 1


class Tiles(NamedTuple):
    """One for each kernel of triton_kernels.py, and what a strip of maps may take in memory, in bytes.

    A strip is written by one kernel and read by the next: it should stay in the second-level cache.
    """

    plain: Tile
    exps: Tile
    mix: Tile
    times: Tile
    maps: Tile
    grads: Tile
    keys: Tile
    strip_bytes: int
    backward_bytes: int


# Cards, and first two numbers of Triton's version, that have a result in examples/benchmarks/results.
MEASURED: frozenset[tuple[str, str]] = frozenset()

_MIB = 2**20

# By architecture and by head width up to 64 and up to 128 (wider ones take the default's): tiles of the kernels whose
# work grows with the width. Chosen by what they compile to, registers and shared memory for as many warps as possible
# on a multiprocessor, and by the size of the second-level cache. None has been timed yet.
_BY_WIDTH: dict[str, dict[int, dict[str, Tile]]] = {
    "sm_80": {
        64: {
            "plain": Tile(64, 64, 4, 3),
            "exps": Tile(64, 128, 4, 2, 4),
            "times": Tile(64, 64, 4, 3),
            "maps": Tile(64, 64, 4, 2, 4),
            "keys": Tile(32, 64, 4, 3),
        },
        128: {
            "plain": Tile(64, 64, 4, 2),
            "exps": Tile(64, 128, 4, 2, 4),
            "times": Tile(64, 64, 4, 3),
            "maps": Tile(64, 64, 8, 2, 4),
            "keys": Tile(64, 64, 8, 2),
        },
    },
    "sm_90": {
        64: {
            "plain": Tile(128, 64, 8, 3),
            "exps": Tile(128, 128, 8, 2, 4),
            "times": Tile(64, 128, 4, 3),
            "maps": Tile(128, 64, 8, 2, 4),
            "keys": Tile(64, 64, 4, 3),
        },
        128: {
            "plain": Tile(128, 64, 8, 2),
            "exps": Tile(128, 128, 8, 1, 4),
            "times": Tile(64, 64, 4, 3),
            "maps": Tile(128, 64, 8, 1, 4),
            "keys": Tile(64, 64, 8, 2),
        },
    },
    "default": {
        64: {
            "plain": Tile(64, 64, 4, 2),
            "exps": Tile(64, 64, 4, 2, 4),
            "times": Tile(64, 64, 4, 2),
            "maps": Tile(64, 64, 4, 1, 4),
            "keys": Tile(64, 64, 4, 1),
        },
        128: {
            "plain": Tile(64, 32, 4, 2),
            "exps": Tile(64, 64, 4, 2, 4),
            "times": Tile(64, 32, 4, 2),
            "maps": Tile(64, 32, 8, 1, 4),
            "keys": Tile(32, 64, 8, 1),
        },
        256: {
            "plain": Tile(32, 32, 8, 1),
            "exps": Tile(32, 32, 4, 1, 4),
            "times": Tile(32, 32, 4, 1),
            "maps": Tile(32, 16, 4, 1, 4),
            "keys": Tile(16, 16, 8, 1),
        },
    },
}
_BY_WIDTH["sm_100"] = {**_BY_WIDTH["sm_90"], 64: {**_BY_WIDTH["sm_90"][64], "times": Tile(64, 64, 4, 3)}}
# as sm_80, with 99 KiB of shared memory instead of 163
_BY_WIDTH["sm_86"] = _BY_WIDTH["sm_89"] = _BY_WIDTH["sm_120"] = {
    64: _BY_WIDTH["sm_80"][64],
    128: {**_BY_WIDTH["sm_80"][128], "exps": Tile(64, 64, 4, 2, 4), "times": Tile(64, 64, 4, 2)},
}

# By heads, padded to a power of two: tiles of the kernels that have all heads of a row. The keys of a tile of `mix`
# are those of `exps`.
_BY_HEADS = {
    16: {"mix": Tile(1, 0, 4, 4), "grads": Tile(1, 128, 4, 3)},
    32: {"mix": Tile(1, 0, 4, 3), "grads": Tile(1, 64, 4, 2)},
    64: {"mix": Tile(1, 0, 8, 2), "grads": Tile(1, 32, 8, 2)},
}
MOST_HEADS = max(_BY_HEADS)
MOST_WIDTH = max(_BY_WIDTH["default"])

# Of a strip, forward; twice that backward, up to a bound: one to one and a half times the second-level cache. Smaller
# ones would stay in it as a whole, and take more launches, which then take longer than what they launch.
_STRIP_BYTES = {"sm_80": 56 * _MIB, "sm_89": 72 * _MIB, "sm_90": 72 * _MIB, "sm_100": 96 * _MIB, "sm_120": 96 * _MIB}
_DEFAULT_STRIP_BYTES = 48 * _MIB
_MOST_BACKWARD_BYTES = 72 * _MIB  # of the two strips of a backward pass, beside float32 sums for keys and values


def choose(architecture: str, heads: int, width: int, queries: int, keys: int) -> Tiles:
    """The table's entry for attention of so many heads, and heads of such a width at most.

    Tiles are no larger than what they are to hold. An architecture that is not in the table has the default's.
    """
    by_width = _BY_WIDTH["default"] | _BY_WIDTH.get(architecture, {})
    fields = by_width[next(limit for limit in sorted(by_width) if width <= limit)]
    fields = fields | _BY_HEADS[next(limit for limit in sorted(_BY_HEADS) if heads <= limit)]
    fields = {name: _shrunk(tile, queries, keys) for name, tile in fields.items()}
    strip_bytes = _STRIP_BYTES.get(architecture, _DEFAULT_STRIP_BYTES)
    return Tiles(**fields, strip_bytes=strip_bytes, backward_bytes=min(2 * strip_bytes, _MOST_BACKWARD_BYTES))


def _shrunk(tile: Tile, queries: int, keys: int) -> Tile:
    return tile._replace(rows=min(tile.rows, power_of_two(queries)), keys=min(tile.keys, power_of_two(keys)))


def power_of_two(n: int, least: int = 16) -> int:
    """The next one from n on; the kernels' products need 16 of everything."""
    return max(least, 1 << (n - 1).bit_length())
