"""Hostile coefficient files through every function and command that reads one.

    make fuzz                                             # 10,000 of them, some minutes; goes on where it was stopped
    python tests/fuzz/fuzz.py --seed 7 --mutants 500
    python tests/fuzz/fuzz.py --seed 7 --only 123         # one again

Each is refused by a ValueError or OSError that names the file, or loaded and equal to what it says. There is no other
exception, no traceback from a command, no escape sequence or forged line in what is printed, no hang, no more than 64
MB of memory above the file, and after a refusal the model's output is the same to the bit. What is found otherwise is
appended to `<folder>/seed-<seed>.jsonl`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import os
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))  # hosts.py

import torch
from hosts import HOSTS, randomise
from safetensors import SafetensorError
from safetensors.torch import load

from coeff_diffusers import (
    add_coeff_adapter,
    cli,
    delete_coeff_adapters,
    list_coeff_adapters,
    load_coeff_weights,
    merge_coeff_files,
    prune_coeff_file,
    read_coeff_metadata,
    save_coeff_weights,
    set_coeff_adapters,
)
from coeff_diffusers.checkpoint import coeff_state_dict
from coeff_diffusers.coeff_file import MAX_VALUE
from coeff_diffusers.commands import coeff_files
from fuzz.mutants import Good, make

MOST_MEMORY = 64 * 2**20
MOST_SECONDS = 20


class Hang(BaseException):
    """Raised by the alarm, and caught by nothing of the package's."""


class Bench:
    """A model with an adapter, a good file, and what is done with each mutant."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.model = HOSTS["unet"].build().eval()
        add_coeff_adapter(self.model)
        randomise(self.model)
        good = save_coeff_weights(
            self.model, folder, weight_name="good.safetensors", metadata={"instance_prompt": "x"}
        )
        self.good_file, self.good = good, Good(good.read_bytes())
        self.model.save_config(folder / "model")
        self.config, self.out = folder / "model", folder / "out.safetensors"
        self.values = coeff_state_dict(self.model)
        self.output = self.run()
        self.skeleton, self.parser = functools.cache(coeff_files.skeleton), cli.make_parser()  # saves minutes
        self.found: list[dict[str, Any]] = []
        self.outcomes: Counter[str] = Counter()

    @torch.no_grad()
    def run(self) -> torch.Tensor:
        return HOSTS["unet"].run(self.model)

    def examine(self, seed: int, index: int, folder: Path) -> None:
        kind, path = make(self.good, folder, seed, index)
        self.at = {"seed": seed, "index": index, "kind": kind}
        size = path.stat().st_size if path.is_file() else 0
        before = _reset_peak()
        with self.changed_while_read(path, index) as changes:
            for name, function in self.functions(path).items():
                self.call(name, function, path, changes)
            for arguments in self.commands(path, index):
                self.shell(arguments, path)
        if _peak() - before > MOST_MEMORY + min(size, 2**28):
            self.report("memory", f"{(_peak() - before) / 2**20:.0f} MB for a file of {size:,} bytes")
        if not torch.equal(self.run(), self.output):
            self.report("output", "the model's output is another")

    def functions(self, path: Path) -> dict[str, Callable[[], Any]]:
        model = self.model
        return {
            "load": lambda: load_coeff_weights(model, path, adapter_name="mutant"),
            "load not strict": lambda: load_coeff_weights(model, path, adapter_name="mutant", strict=False),
            "hotswap": lambda: load_coeff_weights(model, path, hotswap=True),
            "load from folder": lambda: load_coeff_weights(
                model, path.parent, weight_name=path.name, adapter_name="mutant"
            ),
            "load forced": lambda: load_coeff_weights(
                model, path, adapter_name="mutant", strict=False, allow_large_values=True
            ),
            "metadata": lambda: read_coeff_metadata(path),
            "merge": lambda: merge_coeff_files([self.good_file, path], self.out, [1.0, 0.5]),
            "prune": lambda: prune_coeff_file(path, self.out, layers=1),
        }

    def commands(self, path: Path, index: int) -> list[list[str]]:
        """All nine; drawing, which takes a second, for some."""
        file, good, out, config = str(path), str(self.good_file), str(self.out), str(self.config)
        commands = [
            ["info", file],
            ["info", file, "--json"],
            ["check", file, "--model", config],
            ["check", file, "--model", config, "--json"],
            ["diff", good, file],
            ["diff", file, good, "--json"],
            ["merge", file, good, "-o", out, "--average"],
            ["prune", file, "-o", out, "--entries", "3", "--json"],
        ]
        return commands + ([["info", file, "--plot", f"{out}.png"]] if index % 50 == 14 else [])

    def call(self, name: str, function: Callable[[], Any], path: Path, changes: bool) -> None:
        try:
            with _alarm():
                result = function()
        except (ValueError, OSError) as error:
            self.outcomes[f"{name}: refused"] += 1
            self.check_text(name, str(error), path)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            self.report(name, f"{type(error).__name__}: {error}"[:500])
        else:
            self.outcomes[f"{name}: done"] += 1
            if name.startswith(("load", "hotswap")):
                self.check_loaded(name, path, {} if result is None else result, changes)
        if name.startswith("hotswap"):
            load_coeff_weights(self.model, self.values, hotswap=True)
        if "mutant" in list_coeff_adapters(self.model):
            delete_coeff_adapters(self.model, "mutant")
            set_coeff_adapters(self.model, "default")

    def check_loaded(self, name: str, path: Path, left_out: dict[str, str], changes: bool) -> None:
        here = coeff_state_dict(self.model, "default" if name == "hotswap" else "mutant")
        limit = torch.finfo(torch.float32).max if name == "load forced" else MAX_VALUE
        if not all(torch.isfinite(delta).all() and delta.abs().max() <= limit for delta in here.values()):
            self.report(name, "loaded values that must be refused")
        if changes:
            return  # which of the contents was read is not known
        try:
            there = load(path.read_bytes())
        except (SafetensorError, OSError) as error:
            self.report(name, f"loaded what safetensors refuses: {error}")
            return
        expected = {key: delta.to(torch.float32) for key, delta in there.items() if key not in left_out}
        if here.keys() != expected.keys() or not all(torch.equal(here[key], expected[key]) for key in here):
            self.report(name, "loaded other values than the file has")

    def shell(self, arguments: list[str], path: Path) -> None:
        name = " ".join(part for part in arguments if part.startswith("--") or part == arguments[0])
        out, err = io.StringIO(), io.StringIO()
        try:
            with (
                _alarm(),
                mock.patch.object(coeff_files, "skeleton", self.skeleton),
                mock.patch.object(cli, "make_parser", return_value=self.parser),
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
            ):
                code = cli.main(arguments)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            self.report(name, f"{type(error).__name__}: {error}"[:500])
            return
        printed, complaint = out.getvalue(), err.getvalue()
        self.outcomes[f"{name}: {code}"] += 1
        if code not in (0, 1, 2) or "Traceback" in complaint or (code == 2) != bool(complaint):
            self.report(name, f"exit code {code}, {complaint[-500:]}")
        elif code == 2:
            self.check_text(name, complaint, path)
        else:
            self.check_text(name, printed)
            if "--json" in arguments:
                json.loads(printed, parse_constant=lambda text: self.report(name, f"prints {text}"))

    def check_text(self, name: str, text: str, path: Path | None = None) -> None:
        if path is not None and f"mutant{self.at['index']}" not in text:
            self.report(name, f"does not name the file: {text[:500]}")
        if not text.replace("\n", "").isprintable() or "\nok: it fits" in text:
            self.report(name, f"prints what is not to be printed: {text[:500]!r}")

    def report(self, name: str, what: str) -> None:
        self.found.append({**self.at, "by": name, "what": what})

    @contextlib.contextmanager
    def changed_while_read(self, path: Path, index: int) -> Iterator[bool]:
        """Every 10th regular file is written anew and cut off, in its place, as long as it is examined."""
        if index % 10 != 3 or not path.is_file() or path.stat().st_size > 2**20 or path.is_symlink():
            yield False
            return
        contents, stop = [path.read_bytes(), self.good.data], threading.Event()

        def change() -> None:
            with open(path, "r+b", buffering=0) as file:
                while not stop.wait(0.0002):
                    contents.append(contents.pop(0))
                    os.pwrite(file.fileno(), contents[0], 0)
                    file.truncate(len(contents[0]))
                    if stop.wait(0.0002):
                        break
                    file.truncate(len(contents[0]) // 2)

        thread = threading.Thread(target=change)
        thread.start()
        try:
            yield True
        finally:
            stop.set()
            thread.join()


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise Hang(f"not done in {MOST_SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(MOST_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _reset_peak() -> int:
    """Bytes in memory now, from which the peak is counted anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _peak() -> int:
    return _memory("VmHWM")


def _memory(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{what}:"))


def run(bench: Bench, seed: int, indices: range, folder: Path) -> None:
    for index in indices:
        with tempfile.TemporaryDirectory(dir=folder) as empty:
            bench.examine(seed, index, Path(empty))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mutants", type=int, default=10_000)
    parser.add_argument("--only", type=int, help="one, whose findings are printed and not recorded")
    parser.add_argument("--folder", type=Path, default=Path("outputs/fuzz"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    log, progress = args.folder / f"seed-{args.seed}.jsonl", args.folder / f"seed-{args.seed}.progress.json"
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        if args.only is not None:
            run(bench, args.seed, range(args.only, args.only + 1), Path(folder))
            print(json.dumps(bench.found, indent=2), dict(bench.outcomes), sep="\n")
            return int(bool(bench.found))
        state = json.loads(progress.read_text()) if progress.exists() else {"next": 0, "running": None, "outcomes": {}}
        bench.outcomes.update(state["outcomes"])
        if state["running"] is not None:
            bench.at = {"seed": args.seed, "index": state["running"], "kind": "?"}
            bench.report("process", "it was killed, or died, at this mutant or before its end")
            state["next"] = state["running"] + 1
        for index in range(state["next"], args.mutants):
            progress.write_text(json.dumps({"next": index, "running": index, "outcomes": bench.outcomes}))
            try:
                run(bench, args.seed, range(index, index + 1), Path(folder))
            except KeyboardInterrupt:
                progress.write_text(json.dumps({"next": index, "running": None, "outcomes": bench.outcomes}))
                return 1
            with log.open("a") as file:
                file.writelines(json.dumps(found) + "\n" for found in bench.found)
            bench.found.clear()
            if index % 500 == 499:
                print(f"{index + 1:,} mutants", flush=True)
        progress.write_text(json.dumps({"next": args.mutants, "running": None, "outcomes": bench.outcomes}))
    findings = log.read_text().splitlines() if log.exists() else []
    for name, count in sorted(bench.outcomes.items()):
        print(f"  {name}: {count:,}")
    print(
        f"{args.mutants:,} mutants of seed {args.seed}: {len(findings)} findings" + (f", in {log}" if findings else "")
    )
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
