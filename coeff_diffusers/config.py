"""What an adapter is attached to, and how it is trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

AttentionKind = Literal["self", "cross", "joint"]
KINDS: tuple[AttentionKind, ...] = ("self", "cross", "joint")


@dataclass(frozen=True)
class CoeffConfig:
    """Which attention layers get coefficients, and the dropout of their training.

    Args:
        include: shell-style patterns on module paths, or on their ends: `"attn2"`, `"up_blocks.*.attn1"`. A layer is
            taken if any of them matches. `None` takes all.
        exclude: patterns of layers to leave out, after `include`.
        kinds: kinds of attention to take. `"self"`: queries and keys from the image alone. `"cross"`: keys from
            other tokens, the text. `"joint"`: image and text in one sequence, as in SD 3 and FLUX.
        dropout: probability in [0, 1) with which an entry of Delta is dropped at a forward pass in training (the
            others are scaled by `1 / (1 - dropout)`, the identity is never dropped). The paper found 0.2 best on
            VL-BART and reports no figure for diffusion models; 0 is this project's default.

    Raises:
        ValueError: for an unknown kind, no kind at all, an empty pattern list or a dropout out of range.
        TypeError: for patterns that are not strings.
    """

    include: str | tuple[str, ...] | None = None
    exclude: str | tuple[str, ...] | None = None
    kinds: tuple[AttentionKind, ...] = KINDS
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            object.__setattr__(self, name, _patterns(name, getattr(self, name)))
        kinds = (self.kinds,) if isinstance(self.kinds, str) else tuple(self.kinds)
        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown or not kinds:
            raise ValueError(f"kinds must name at least one of {KINDS}, got {unknown or kinds}")
        object.__setattr__(self, "kinds", kinds)
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types, as they are written into a coefficient file."""
        return asdict(self)


def _patterns(name: str, value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    patterns = (value,) if isinstance(value, str) else tuple(value)
    if any(not isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"{name} must be a pattern or a list of patterns (str), got {value!r}")
    if not patterns or "" in patterns:
        raise ValueError(f"{name} must hold at least one pattern and no empty one, got {value!r}; None takes all")
    return patterns
