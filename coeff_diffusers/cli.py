"""Train coefficients for a subject, generate by them, and look into, compare, merge and prune their files.

    coeff-diffusers train --help
    coeff-diffusers info outputs/demo --plot delta.png
    coeff-diffusers check outputs/demo --model stable-diffusion-v1-5/stable-diffusion-v1-5

Exit codes of the commands on files: 0 done, fits or equal; 1 differs or does not fit; 2 wrong usage, or a file that
cannot be read or written.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import __version__
from .commands import OF_MODELS, run_on_model
from .console import Parser, escaped_output

UNUSABLE = 2


@escaped_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. Its modules are loaded once its flags are understood."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] in OF_MODELS:
        return run_on_model(argv[0], argv[1:])
    args = make_parser().parse_args(argv)
    from .commands import coeff_files
    from .files import printable

    try:
        code, result, text = getattr(coeff_files, args.command)(args)
        text = json.dumps(result, indent=2, allow_nan=False) if args.json else text
    except (ValueError, OSError, ImportError) as error:
        lines = map(printable, f"coeff-diffusers {args.command}: {error}".split("\n"))
        print("\n".join(lines), file=sys.stderr)
        return UNUSABLE
    except Exception:  # a fault of the program's own, which must not end with 1: that is an answer
        traceback.print_exc()
        return UNUSABLE
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader, `head` say, has seen enough; nothing more is to be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return int(code)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser("coeff-diffusers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in OF_MODELS.items():
        commands.add_parser(name, help=summary, add_help=False)
    what = "a .safetensors file, a folder with one, or a repository of the Hub"

    sub = _command(commands, "info", "what a file is for, how large Delta is by layer, which heads mix most",
                   "info outputs/demo", "info dog.safetensors --plot dog.png",
                   "info dog.safetensors --json | jq .header")  # fmt: skip
    sub.add_argument("file", help=what)
    sub.add_argument("--top", type=int, default=8, help="how many heads to list")
    sub.add_argument("--plot", type=Path, metavar="PNG", help="draws Delta of every layer (pip install matplotlib)")
    sub.add_argument("--growth", type=Path, metavar="PNG", help="draws how Delta grew over the checkpoints of a run")

    sub = _command(commands, "merge", "adds files up: sum_k weight_k Delta_k",
                   "merge dog.safetensors style.safetensors -o both.safetensors --weights 1 0.5",
                   "merge a.safetensors b.safetensors -o difference.safetensors --weights 1 -1",
                   "merge a.safetensors b.safetensors c.safetensors -o mean.safetensors --average",
                   "merge cat.safetensors dog.safetensors -o between.safetensors --interpolate 0.3")  # fmt: skip
    sub.add_argument("files", nargs="+", metavar="FILE", help=what)
    sub.add_argument("-o", "--output", type=Path, required=True, help="the new .safetensors file")
    how = sub.add_mutually_exclusive_group()
    how.add_argument("--weights", type=float, nargs="+", metavar="W", help="one for each file; 1 by default")
    how.add_argument("--average", action="store_true", help="weighs each of n files by 1/n")
    how.add_argument("--interpolate", type=float, metavar="T", help="weighs two files by 1 - T and T")
    sub.add_argument("--ignore-base-name", action="store_true", help="merge though the base models' names differ")

    sub = _command(commands, "prune", "leaves the small entries or the layers that matter least out",
                   "prune dog.safetensors -o small.safetensors --entries 200",
                   "prune dog.safetensors -o small.safetensors --layers 10")  # fmt: skip
    sub.add_argument("file", help=what)
    sub.add_argument("-o", "--output", type=Path, required=True, help="the new .safetensors file")
    how = sub.add_mutually_exclusive_group(required=True)
    how.add_argument("--entries", type=int, metavar="K", help="keeps the K entries of the largest magnitude")
    how.add_argument("--layers", type=int, metavar="K", help="keeps the K layers of the largest relative norm")

    sub = _command(commands, "diff", "compares two files; exit code 1 if they differ",
                   "diff run1/pytorch_coeff_weights.safetensors run2/pytorch_coeff_weights.safetensors",
                   "diff a.safetensors b.safetensors --tolerance 1e-6 --plot difference.png")  # fmt: skip
    sub.add_argument("file", help=what)
    sub.add_argument("other", help=what)
    sub.add_argument("--tolerance", type=float, default=0.0, help="largest difference of an entry that is none")
    sub.add_argument("--plot", type=Path, metavar="PNG", help="draws the second less the first")

    sub = _command(commands, "check", "tells whether a file fits a model, by its config alone; exit code 1 if not",
                   "check outputs/demo --model stable-diffusion-v1-5/stable-diffusion-v1-5",
                   "check dog.safetensors --model models/my-model && echo it fits")  # fmt: skip
    sub.add_argument("file", help=what)
    sub.add_argument("--model", required=True, help="a pipeline or model: a folder, or a name on the Hub")
    return parser


def _command(commands: Any, name: str, summary: str, *examples: str) -> argparse.ArgumentParser:
    epilog = "examples:\n" + "\n".join(f"  coeff-diffusers {example}" for example in examples)
    sub: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{name}: {summary}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.add_argument("--json", action="store_true", help="prints JSON")
    return sub


if __name__ == "__main__":
    sys.exit(main())
