"""Mixed attention on a GPU by Triton kernels, triton_kernels.py, for bfloat16 and float16.

No mixed map can be formed before the softmax of all heads is known, and the maps of all heads are too large for the
registers that hold a tile in fused attention. So a strip of query rows, of all heads, lives in an array that is small
enough for the second-level cache, and goes through three kernels:

1. `exps`: scores of a tile of queries and keys, and their exponentials less the tile's largest, written once in 16
   bits, with each row's largest and sum.
2. `mix`: one row, all heads. Its largest scores and sums are complete now, so that what each tile must be multiplied
   by is known and goes into alpha: alpha maps is then one (H x H) (H x keys) product, written back in place.
3. `times`: the strip times the values.

Backward, from each row's largest score and sum, which the forward pass keeps (8 bytes a row and head):

1. `maps`: the maps again, and the gradients of the mixed maps, dO V^T.
2. `grads`: one row, all heads: one (H x H) product gives alpha's gradient and what softmax's derivative takes off;
   then the gradients of the scores, and the mixed maps, in place.
3. `times` with the keys gives the queries' gradient; `keys` those of keys and values, added up over strips in float32.

Alpha enters a 16-bit product as the sum of two numbers. Float16 maps are kept times a power of two ([`gain_of`] of
common.py says why), gradients of float16 maps in float32. Heads whose coefficients are all zero are left out of all
this, and take attention of the usual kind (`plain`): on the device, without a look at the coefficients from here. Sums
have an order that depends on the shapes and the card alone, so that equal inputs give equal bits.

float32 inputs are the loop's (loop.py): their products do not run on matrix units, unless TF32 is asked for, and a
fused kernel would gain little over torch's own.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import sys
import threading
from typing import Any

import torch
from torch import Tensor

from . import loop, tiles
from .common import empty_output
from .tiles import power_of_two

logger = logging.getLogger(__name__)

_LOG2_E = math.log2(math.e)
_DTYPES = (torch.bfloat16, torch.float16)
_MOST_PROGRAMS = 65535  # along the second and third axis of a launch
_MOST_SPLITS = 8
_MOST_STATISTICS = 64  # tiles whose largest scores and sums mix_kernel holds at once
_MOST_BYTES = 2**28  # of a strip that is larger than the table says, for the sake of its rows
_MAP_GAIN = 2.0**10  # of float16 maps of the backward pass: 1 at most before


def _on_its_device(run: Any) -> Any:
    """Makes the device of the tensors current: Triton launches on that, whatever tensors it is given."""

    @functools.wraps(run)
    def run_there(x: Tensor, *args: Any) -> Any:
        with torch.cuda.device_of(x):
            return run(x, *args)

    return run_there


@_on_its_device
def forward(
    query: Tensor, key: Tensor, value: Tensor, coeff: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The output, laid out as (B, T, H, E); and of each row the largest score, in base 2, and one by its sum."""
    from . import triton_kernels as kernels

    B, H, T, _ = query.shape
    out = empty_output(query, value)
    statistics = query.new_empty(2, B, H, T, dtype=torch.float32)
    call = _Call(query, key, value, coeff, attn_mask, is_causal, out=out, statistics=statistics)
    call.prepare(kernels)
    plain, exps, mix, *_ = call.tiles
    call.launch(kernels.plain_kernel, plain, (_cdiv(T, plain.rows), H, B), scale=scale * _LOG2_E)
    if scale < 0.0:  # so that the largest score is that of the largest product
        call.set(query=-call.known["query"])
        call.set_alignment()
    samples, R, SP = call.strip(call.tiles.strip_bytes, query.element_size(), exps.rows, exps.rows)
    NT = _cdiv(SP, exps.keys)
    tops, sums = query.new_empty(2, samples, H, R, NT, dtype=torch.float32)
    strip = query.new_empty(samples, H, R, SP)
    call.set(strip=strip, tops=tops, sums=sums, NT=NT, NTP=min(power_of_two(NT, 2), _MOST_STATISTICS))
    call.set_product(kernels, strip, call.known["value"], out, 1.0, everywhere=False)
    parts = max(1, min(_cdiv(6 * multiprocessors(query.device), R * samples), NT // 4))
    for b, count, t, rows in _strips(B, T, samples, R):
        call.set_strip(b, t, rows)
        grid = (_cdiv(rows, exps.rows) * _cdiv(NT, exps.tiles), H, count)
        call.launch(kernels.exps_kernel, exps, grid, scale=abs(scale) * _LOG2_E)
        call.launch(kernels.mix_kernel, mix._replace(keys=exps.keys), (rows, count, parts))
        call.times(kernels, rows, count)
    return out, statistics


@_on_its_device
def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coeff: Tensor,
    attn_mask: Tensor | None,
    statistics: Tensor,
    is_causal: bool,
    scale: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, laid out as these are, and of alpha; empty where not wanted."""
    from . import triton_kernels as kernels

    B, H, T, S = *query.shape[:3], key.shape[2]
    gradients = [torch.empty_like(x) if wants else x.new_empty(0) for x, wants in zip((query, key, value), wanted)]
    call = _Call(query, key, value, coeff, attn_mask, is_causal, grad_out=grad_out, statistics=statistics)
    call.prepare(kernels)
    *_, of_maps, of_grads, of_keys, _, _ = call.tiles
    half = query.dtype == torch.float16
    samples, R, SP = call.strip(
        call.tiles.backward_bytes, 8 if half else 4, of_maps.rows, 256, 4 * power_of_two(H) ** 2
    )
    written = [_to_write(x) for x in gradients]
    if R < T:  # sums over strips
        contiguous = torch.contiguous_format
        written[1:] = [torch.empty_like(x, dtype=torch.float32, memory_format=contiguous) for x in written[1:]]
    maps = query.new_empty(samples, H, R, SP)
    grads = torch.empty_like(maps, dtype=torch.float32 if half else query.dtype)
    grad_scores = torch.empty_like(maps) if half else grads
    products = query.new_empty(samples, R, power_of_two(H), power_of_two(H), dtype=torch.float32)
    NT = _cdiv(SP, of_maps.keys)
    call.set(maps=maps, grads=grads, grad_scores=grad_scores, products=products, MAP_GAIN=_MAP_GAIN if half else 1.0)
    call.set(grad_key=written[1], grad_value=written[2], OF_KEYS=wanted[1], OF_VALUES=wanted[2], NT=NT)
    if wanted[0]:
        call.set_product(kernels, grad_scores, call.known["key"], written[0], scale, everywhere=True)
    grad_alpha = query.new_zeros(B if wanted[3] else 0, H, H, dtype=torch.float64)
    for b, count, t, rows in _strips(B, T, samples, R):
        call.set_strip(b, t, rows)
        grid = (_cdiv(rows, of_maps.rows) * _cdiv(NT, of_maps.tiles), H, count)
        call.launch(kernels.maps_kernel, of_maps, grid, scale=scale * _LOG2_E)
        call.launch(kernels.grads_kernel, of_grads, (rows, count))
        if wanted[3]:
            grad_alpha[b : b + count] += products[:count, :rows, :H, :H].sum(1, dtype=torch.float64)
        if wanted[0]:
            call.times(kernels, rows, count)
        if wanted[1] or wanted[2]:
            call.launch(kernels.keys_kernel, of_keys, (_cdiv(S, of_keys.keys), H, count), scale=scale, ADD=t > 0)
    for gradient, computed in zip(gradients, written):
        if gradient is not computed:
            gradient.copy_(computed)
    return (*gradients, grad_alpha)  # type: ignore[return-value]


class _Call:
    """What the kernels of a pass are launched with, by the names of their parameters."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        coeff: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        **arrays: Tensor,
    ) -> None:
        B, H, T, D = query.shape
        S, E = value.shape[2:]
        self.device = query.device
        self.launched: dict[Any, dict[str, Any]] = {}
        self.tiles = tiles.choose(architecture(query.device), H, max(D, E), T, S)
        self.known: dict[str, Any] = {"B": B, "H": H, "T": T, "S": S, "D": D, "E": E, "CAUSAL": is_causal}
        self.known |= {"first_sample": 0, "first_row": 0, "rows": 0}  # of the strip
        self.known |= {
            "HP": power_of_two(H),
            "BD": power_of_two(D),
            "BE": power_of_two(E),
            "GAIN": query.dtype == torch.float16,
        }
        self.known |= {"EVEN_D": power_of_two(D) == D, "EVEN_E": power_of_two(E) == E}
        self.set(coeff=coeff, stride_ab=0 if coeff.ndim == 2 else coeff.stride(0))
        self.set(stride_ai=coeff.stride(-2), stride_aj=coeff.stride(-1))
        self.set(**{name: _to_read(x) for name, x in {"query": query, "key": key, "value": value, **arrays}.items()})
        self.set_mask(attn_mask)
        self.set_alignment()

    def set(self, **known: Any) -> None:
        """Adds arguments, and the strides of arrays with a letter for them."""
        self.known |= known
        for name, letters in _STRIDES.items():
            if name in known:
                strides = known[name].stride() if known[name].numel() else (0, 0, 0)
                self.known |= {f"stride_{letter}": stride for letter, stride in zip(letters, strides)}

    def set_alignment(self) -> None:
        """Whether inputs can be loaded 16 bytes at a time, by their strides, in entries, and where they begin."""
        names = [name for name in ("query", "key", "value", "grad_out") if name in self.known]
        strides = [self.known[f"stride_{letter}"] for name in names for letter in _STRIDES[name]]
        starts = [0 if self.device.type == "meta" else self.known[name].data_ptr() for name in names]
        self.known["ALIGNED"] = not any(stride % 8 for stride in strides) and not any(start % 16 for start in starts)

    def set_mask(self, attn_mask: Tensor | None) -> None:
        """The mask, a kind of it (see the kernels' `_masked`), and strides, which are zero where it is broadcast."""
        if attn_mask is None:
            mask, kind, strides = self.known["query"], 0, [0, 0, 0, 0]
        else:
            boolean = attn_mask.dtype == torch.bool
            mask = attn_mask.view(torch.uint8) if boolean else attn_mask
            kind = (1 if boolean else 2) + (2 if attn_mask.shape[2] == 1 else 0)
            strides = [0 if size == 1 else stride for size, stride in zip(attn_mask.shape, attn_mask.stride())]
        self.known |= {
            "mask": mask,
            "MASK": kind,
            **dict(zip(("stride_mb", "stride_mh", "stride_mt", "stride_ms"), strides)),
        }

    def prepare(self, kernels: Any) -> None:
        """Of each sample's heads: which are mixed, whose maps they need, gains."""
        B, H = self.known["B"], self.known["H"]
        mixed, needed = torch.empty(2, B, H, dtype=torch.int32, device=self.device)
        gain = torch.empty(B, H, dtype=torch.float32, device=self.device)
        self.set(mixed=mixed, needed=needed, gain=gain)
        self.launch(kernels.prepare_kernel, tiles.Tile(1, 0, 4, 1), (B,))

    def strip(
        self, budget: int, entry_bytes: int, tile_rows: int, least_rows: int, beside: int = 0
    ) -> tuple[int, int, int]:
        """Samples, rows and padded keys of a strip: whole samples, or else some rows of one, as many in each strip.

        At least `least_rows`, unless these take more than _MOST_BYTES; whole tiles of rows, if possible. `beside`:
        bytes of a row that are none of its maps'.
        """
        B, H, T, S = (self.known[name] for name in "BHTS")
        SP = _cdiv(S, 16) * 16
        row_bytes = H * SP * entry_bytes + beside
        rows = max(budget // row_bytes, min(least_rows, _MOST_BYTES // row_bytes), 1)
        samples = min(B, rows // T, _MOST_PROGRAMS) if rows >= T else 1
        if rows >= T:
            rows = T
        elif rows >= tile_rows:
            rows = rows // tile_rows * tile_rows
            rows = _cdiv(_cdiv(T, _cdiv(T, rows)), tile_rows) * tile_rows
        self.set(R=rows, SP=SP)
        return samples, rows, SP

    def set_product(
        self, kernels: Any, strip: Tensor, right: Tensor, out: Tensor, scale: float, everywhere: bool
    ) -> None:
        """What [`times`] launches: out = strip right scale, of all heads or of the mixed ones.

        The keys are divided into so many parts that each multiprocessor has two programs.
        """
        width, tile = right.shape[3], self.tiles.times
        programs = _cdiv(strip.shape[2], tile.rows) * strip.shape[1] * strip.shape[0]
        longest = _cdiv(self.known["S"], 4 * tile.keys)
        splits = max(1, min(_cdiv(2 * multiprocessors(self.device), programs), longest, _MOST_SPLITS))
        rows = strip.shape[:3] if splits > 1 else (0,)
        partial = torch.empty(splits, *rows, width, dtype=torch.float32, device=self.device)
        self.set(strip=strip, right=right, out=out, partial=partial, SPLITS=splits, ALL=everywhere)
        of_product = {"E": width, "BE": power_of_two(width), "EVEN_E": power_of_two(width) == width, "scale": scale}
        of_product["GAIN"] = self.known["GAIN"] and not everywhere  # gradients of scores have none
        for kernel in (kernels.times_kernel, kernels.sum_kernel):
            self.prepare_launch(kernel, tile, **of_product)

    def times(self, kernels: Any, rows: int, count: int) -> None:
        tile, H, splits = self.tiles.times, self.known["H"], self.known["SPLITS"]
        tiles_of_rows = _cdiv(rows, tile.rows)
        self.launch(kernels.times_kernel, tile, (tiles_of_rows * splits, H, count))
        if splits > 1:
            self.launch(kernels.sum_kernel, tile, (tiles_of_rows, H, count))

    def prepare_launch(self, kernel: Any, tile: tiles.Tile, **more: Any) -> None:
        """Looks up what a kernel is given, once a pass: a launch must not take longer than what it launches."""
        T, S, R = (self.known.get(name, 0) for name in "TSR")
        of_tile = {"BM": tile.rows, "BN": tile.keys, "TILES": tile.tiles, "STAGES": tile.stages}
        # tiles that end where the arrays end need no masks
        of_tile["EVEN_T"] = T % tile.rows == 0 and R % tile.rows == 0
        of_tile["EVEN_S"] = tile.keys > 0 and S % tile.keys == 0
        known = self.known | of_tile | more
        self.launched[kernel] = {name: known[name] for name in kernel.arg_names} | {"num_warps": tile.warps}

    def launch(self, kernel: Any, tile: tiles.Tile, grid: tuple[int, ...], **more: Any) -> None:
        if kernel not in self.launched:
            self.prepare_launch(kernel, tile, **more)
        arguments = self.launched[kernel]
        arguments.update(more)
        kernel[grid](**arguments)

    def set_strip(self, first_sample: int, first_row: int, rows: int) -> None:
        strip = {"first_sample": first_sample, "first_row": first_row, "rows": rows}
        self.known |= strip
        for arguments in self.launched.values():
            if "rows" in arguments:
                arguments.update(strip)


_STRIDES = {
    "query": ("qb", "qh", "qt"),
    "key": ("kb", "kh", "ks"),
    "value": ("vb", "vh", "vs"),
    "right": ("rb", "rh", "rs"),
    "out": ("ob", "oh", "ot"),
    "grad_out": ("gb", "gh", "gt"),
    "grad_key": ("dkb", "dkh", "dks"),
    "grad_value": ("dvb", "dvh", "dvs"),
}


def _strips(B: int, T: int, samples: int, rows: int) -> Any:
    """First sample and their count, first row and their count, of each strip."""
    for b in range(0, B, samples):
        for t in range(0, T, rows):
            yield b, min(samples, B - b), t, min(rows, T - t)


def _to_read(x: Tensor) -> Tensor:
    """`x`, or a copy whose last dimension has no gaps."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _to_write(x: Tensor) -> Tensor:
    """`x`, or room for what is to be copied into it."""
    return x if x.stride(-1) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


@functools.cache
def architecture(device: torch.device) -> str:
    """Of a GPU as the table of tiles.py has it: sm_90, gfx942; "cpu" where Triton's interpreter runs the kernels."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


# Whether the kernels may be called.


@functools.cache
def is_installed() -> bool:
    """Whether Triton is: torch's CUDA and ROCm wheels for Linux bring it, `triton-windows` has it for Windows."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def triton_version() -> str:
    """Its first two numbers: what one release compiles rightly, another may not."""
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether [`forward`] and [`backward`] compute attention of these inputs."""
    B, H, _, D = query.shape
    S, E = value.shape[2:]
    return (
        _is_gpu(query.device)
        and query.dtype == key.dtype == value.dtype
        and query.dtype in _DTYPES
        and all(size > 0 for size in (*query.shape, S, E))
        and (B <= _MOST_PROGRAMS and H <= tiles.MOST_HEADS and max(D, E) <= tiles.MOST_WIDTH)
        and 16 * H * (S + 16) < 2**31  # offsets within 16 rows of a strip, of all heads, are int32
        and is_installed()
        and _has_matrix_units(query.device)
        and _failures.get(_kind(query, value)) is None
        and _is_right(query.device, query.dtype)
    )


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"  # which ROCm's are called, too


@functools.cache
def _has_matrix_units(device: torch.device) -> bool:
    """Of the sort that Triton compiles bfloat16 products for: from the RTX 30 and the A100 on; or a GPU of AMD's."""
    return bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 0)


_failures: dict[tuple[Any, ...], str] = {}  # of what is not tried again
_checked: dict[tuple[torch.device, torch.dtype], bool] = {}
_lock = threading.RLock()


def is_passing(error: Exception, device: torch.device) -> bool:
    """Whether an error says nothing of the kernels: no memory, or a first call within the capture of a graph."""
    if _is_gpu(device) and torch.cuda.is_current_stream_capturing():
        return True
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def give_up(query: Tensor, value: Tensor, error: Exception) -> None:
    """From now on such inputs are not taken: their kernels do not compile, or cannot be launched."""
    with _lock:
        if _kind(query, value) in _failures:
            return
        _failures[_kind(query, value)] = repr(error)
    logger.warning(
        "the Triton kernels for attention of %d heads of width %d in %s cannot run on %s, so that torch's functions "
        "compute it from now on, which takes several times as long: %r",
        query.shape[1],
        query.shape[3],
        query.dtype,
        _name(query.device),
        error,
    )


def _kind(query: Tensor, value: Tensor) -> tuple[Any, ...]:
    return query.device, query.dtype, query.shape[1], query.shape[3], value.shape[3]


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels agree with torch's functions on this card; checked once, where no benchmark has run."""
    found = _checked.get((device, dtype))
    if found is not None:
        return found
    if (_name(device), triton_version()) in tiles.MEASURED:
        return _checked.setdefault((device, dtype), True)
    if _is_gpu(device) and torch.cuda.is_current_stream_capturing():
        return _not_while_capturing(device)
    with _lock:
        if (device, dtype) not in _checked:
            _checked[device, dtype] = check(device, dtype)
    return _checked[device, dtype]


@functools.cache
def _not_while_capturing(device: torch.device) -> bool:
    logger.warning(
        "the first attention with coefficients on %s is being captured into a CUDA graph, before the Triton kernels "
        "were checked on this card: the graph will hold torch's functions, which take several times as long. Call "
        "the model once before capturing it.",
        _name(device),
    )
    return False


_TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 4e-3}  # some five times what two roundings differ by


@torch.no_grad()
def check(device: torch.device, dtype: torch.dtype, queries: int = 200, keys: int = 333) -> bool:
    """Whether output and gradients of a small, ragged attention are those of torch's functions; a warning if not."""
    generator = torch.Generator("cpu").manual_seed(0)
    lengths = (queries, keys, keys, queries)
    drawn = [torch.randn(1, n, 5, 40, generator=generator, device="cpu") for n in lengths]
    query, key, value, grad_out = (x.to(device, dtype).transpose(1, 2) for x in drawn)
    coeff = 0.3 * torch.randn(5, 5, generator=generator, device="cpu")
    coeff[1] = 0.0  # a head that is not mixed
    coeff = coeff.to(device)
    mask = (torch.rand(1, 1, queries, keys, generator=generator, device="cpu") > 0.2).to(device)
    rest = (mask, False, 0.2)
    try:
        results = []
        for way in (sys.modules[__name__], loop):
            out, statistics = way.forward(query, key, value, coeff, *rest)
            gradients = way.backward(grad_out, query, key, value, coeff, mask, statistics, False, 0.2, [True] * 4)
            results.append([out, *gradients])
        errors = [
            ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()
            for ours, theirs in zip(*results)
        ]
    except Exception as error:
        if is_passing(error, device):
            raise
        logger.warning(
            "the Triton kernels cannot run on %s in %s, so that torch's functions compute attention with "
            "coefficients, which takes several times as long: %r",
            _name(device),
            dtype,
            error,
        )
        return False
    right = all(error <= _TOLERANCES[dtype] for error in errors)  # NaN is not
    if not right:
        logger.warning(
            "the Triton kernels compute something else on %s in %s than torch's functions, which take their place: "
            "the relative differences of the output and of the gradients of query, key, value and coefficients are "
            "%s, where %g is expected at most. Please report this, with the versions of torch and triton.",
            _name(device),
            dtype,
            ", ".join(f"{error:.1e}" for error in errors),
            _TOLERANCES[dtype],
        )
    return right
