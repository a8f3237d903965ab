"""The state of a run, in folders `checkpoint-N` of the output folder, from which it resumes to the same bits.

    pytorch_coeff_weights.safetensors, pytorch_lora_weights.safetensors    what the run would have written after step N
    state.pt      trainable parameters, optimizer, schedules, averages, losses so far, and which run this is
    files.json    size and SHA-256 of these files

A checkpoint is written under a hidden name, flushed to the disk, and renamed: what has its name is whole. Copies may
not be, so `files.json` is held against the files before one is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch import nn

from ..errors import InputError
from ..images.files import TrainingImage
from ..settings.dreambooth import DreamBoothSettings
from .state import TrainingState
from .subjects import Subjects

STATE, MANIFEST = "state.pt", "files.json"
STATE_VERSION = 1
NAME = re.compile(r"checkpoint-(\d+)")
HIDDEN = ".checkpoint-"

# What may change when a run is continued: these do not touch what is trained.
FREE_SETTINGS = {
    "instance_data_dir", "class_data_dir",  # the images themselves are compared
    "output_dir", "logging_dir", "report_to", "checkpointing_steps", "checkpoints_total_limit",
    "resume_from_checkpoint", "validation_prompt", "num_validation_images", "validation_steps",
    "validation_epochs", "final_validation_prompt", "skip_final_inference",
    "validation_num_inference_steps", "validation_guidance_scale", "sample_batch_size", "dataloader_num_workers",
    "gradient_checkpointing", "checkpoint_every", "group_offload", "offload_activations", "memory", "cache_latents",
    "cache_dir", "push_to_hub", "hub_model_id", "hub_token",
}  # fmt: skip
CHOSEN_FOR_MEMORY = ("mixed_precision", "train_batch_size", "gradient_accumulation_steps", "quantize")  # of the others
GROWING_SCHEDULES = ("constant", "constant_with_warmup")  # which do not depend on the number of steps


class UnusableError(Exception):
    """Why a checkpoint cannot be used."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole, and what it holds."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return len(self.state["losses"])


def checkpoint_paths(folder: str | Path) -> list[Path]:
    """The checkpoints of an output folder, in the order of their steps, whole or not."""
    found = {int(match[1]): path for path in Path(folder).glob("checkpoint-*") if (match := NAME.fullmatch(path.name))}
    return [found[step] for step in sorted(found)]


def find_checkpoint(asked: str | None, output_dir: str, say: Callable[[str], object]) -> Checkpoint | None:
    """The checkpoint to resume from; `None` to start anew.

    Args:
        asked: `--resume_from_checkpoint`.
        output_dir: of the run.
        say: is told of checkpoints that are passed over.

    Raises:
        InputError: if what is asked for is not there or not whole, or a new run would start among the checkpoints of
            another.
    """
    paths = checkpoint_paths(output_dir)
    if asked is None and paths:
        raise InputError(
            f"--output_dir: {output_dir} holds checkpoints of a run, up to {paths[-1].name}: resume it "
            "by --resume_from_checkpoint latest, take another folder, or remove them"
        )
    if asked is None:
        return None
    if asked != "latest":
        return _checkpoint_at(asked, output_dir, paths)
    for path in reversed(paths):
        try:
            return read_checkpoint(path)
        except UnusableError as problem:
            say(f"{path} is passed over: {problem}.")
    say(f"There is no whole checkpoint in {output_dir}: the run starts anew.")
    return None


def _checkpoint_at(asked: str, output_dir: str, paths: Sequence[Path]) -> Checkpoint:
    path = Path(output_dir) / asked
    path = path if path.is_dir() else Path(asked)
    if not path.is_dir():
        names = ", ".join(other.name for other in paths) or "none"
        raise InputError(f"--resume_from_checkpoint: there is no {asked}; {output_dir} has {names}")
    if paths and path.resolve().parent != Path(output_dir).resolve():
        raise InputError(
            f"--resume_from_checkpoint: {path} is not of {output_dir}, which holds checkpoints of its own; take "
            "another --output_dir"
        )
    try:
        return read_checkpoint(path)
    except UnusableError as problem:
        raise InputError(f"--resume_from_checkpoint: {path} cannot be used: {problem}") from problem


def problem_of(path: Path) -> str | None:
    """Why a checkpoint is not whole; `None` if it is."""
    try:
        listed = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        wrong = [name for name, entry in listed.items() if _fingerprint(path / name) != entry]
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} and what it lists cannot be read ({error})"
    if STATE not in listed:
        return f"{MANIFEST} does not list {STATE}"
    return f"{', '.join(wrong)} changed since it was written" if wrong else None


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint, if it is whole.

    Raises:
        UnusableError: if it is not, or not what a run has written.
        InputError: if it is of another release.
    """
    if problem := problem_of(path):
        raise UnusableError(problem)
    try:
        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file makes of the reader
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UnusableError(f"{STATE} cannot be read ({reason})") from error
    version = state.get("version") if isinstance(state, dict) else None
    if isinstance(version, int) and version != STATE_VERSION:
        raise InputError(f"--resume_from_checkpoint: {path} was written by another release of the script")
    if not _is_state(state):
        raise UnusableError(f"{STATE} holds no state of a run")
    return Checkpoint(path, state)


def _is_state(state: Any) -> bool:
    facts = state.get("facts") if isinstance(state, dict) else None
    return (
        isinstance(facts, dict)
        and isinstance(facts.get("settings"), dict)
        and "seed" in facts["settings"]
        and {"images", "processes"} <= facts.keys()
        and isinstance(state.get("losses"), list)
        and all(isinstance(loss, float) for loss in state["losses"])
        and isinstance(state.get("trainee"), dict)
        and isinstance(state.get("version"), int)
    )


def save_checkpoint(folder: Path, state: dict[str, Any], write_weights: Callable[[Path], object]) -> Path:
    """Writes `folder / checkpoint-N`, whole or not at all, N being the number of losses in `state`."""
    target = folder / f"checkpoint-{len(state['losses'])}"
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix=HIDDEN))
    try:
        write_weights(temporary)
        torch.save({"version": STATE_VERSION, **state}, temporary / STATE)
        files = {path.name: _fingerprint(path) for path in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps(files, indent=2) + "\n", encoding="utf-8")
        for path in temporary.iterdir():
            _flush(path)
        _flush(temporary)
        temporary.chmod(0o755)  # mkdtemp's is for this user alone
        _remove(target)
        temporary.rename(target)
        _flush(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def keep_newest(folder: Path, limit: int | None, newest: Path) -> None:
    """Removes checkpoints but for `limit`: those after `newest` first, then the oldest.

    Args:
        folder: where they are.
        limit: how many are kept, `newest` among them; all if `None`.
        newest: the one just written. Those after it are torn, or the run went back to one before them.
    """
    paths = checkpoint_paths(folder)
    place = paths.index(newest) + 1
    for path in [*paths[place:], *paths[:place]][: -limit if limit else 0]:
        _remove(path)


def remove_leftovers(folder: Path) -> None:
    """Removes what a killed process was writing."""
    for path in folder.glob(f"{HIDDEN}*"):
        shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> None:
    """First under a hidden name, so that no part of a checkpoint is ever taken for one."""
    if path.exists():
        hidden = Path(tempfile.mkdtemp(dir=path.parent, prefix=HIDDEN))
        path.rename(hidden / path.name)
        shutil.rmtree(hidden)


def _fingerprint(path: Path) -> list[int | str]:
    content = path.read_bytes()
    return [len(content), hashlib.sha256(content).hexdigest()]


def _flush(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows flushes what may be written
    except PermissionError:
        if path.is_dir():  # which Windows does not open: its file system looks after the names in it
            return
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def facts_of_run(
    settings: DreamBoothSettings, images: Sequence[TrainingImage], denoiser: nn.Module, processes: int
) -> dict[str, Any]:
    """What must be the same for a run to be the same, in types that a state file may hold.

    Args:
        settings: of the run.
        images: that are trained on, of all subjects and classes.
        denoiser: with nothing trained on it.
        processes: how many there are.
    """
    values = {name: value for name, value in asdict(settings).items() if name not in FREE_SETTINGS}
    shown = [[image.digest, image.prompt] for image in images]
    return {"settings": values, "images": shown, "denoiser": denoiser_digest(denoiser), "processes": processes}


def denoiser_digest(denoiser: Any) -> str:
    """Of its config and of the first values of each parameter.

    Left out is what may change without the model (names, defaults of a release of diffusers) and what this process
    does not hold as plain numbers: shards, offloaded and quantised parameters.
    """
    config = {name: value for name, value in denoiser.config.items() if not name.startswith("_")}
    given = {name: config[name] for name in config.keys() - set(denoiser.config.get("_use_default_values", []))}
    digest = hashlib.sha256(json.dumps(given, sort_keys=True, default=lambda value: type(value).__name__).encode())
    for parameter in denoiser.parameters():
        values = parameter.detach()
        plain = type(parameter.data) is torch.Tensor and not values.is_meta and values.is_floating_point()
        if plain and values.numel():
            first = (values[0] if values.ndim else values).flatten()[:16]
            digest.update(first.double().cpu().numpy().tobytes())
    return digest.hexdigest()


def check_same_run(checkpoint: Checkpoint, facts: dict[str, Any]) -> None:
    """Raises InputError, naming all that differs, if the checkpoint is of another run."""
    there, here = checkpoint.state["facts"], facts
    old, new = there["settings"], dict(here["settings"])
    if new["lr_scheduler"] in GROWING_SCHEDULES and new["max_train_steps"] >= checkpoint.step:
        new["max_train_steps"] = old["max_train_steps"]
    old = {"lora_optimizer": old["optimizer"]} | old  # one for all, in checkpoints of earlier releases
    defaults = {field.name: field.default for field in fields(DreamBoothSettings)}  # of those that are new since then
    old = {name: old.get(name, defaults.get(name)) for name in dict.fromkeys((*old, *new))}
    problems = [f"--{name} was {old[name]}, is {new.get(name)}" for name in old if old[name] != new.get(name)]
    if there["processes"] != here["processes"]:
        problems.append(f"there were {there['processes']} processes, are {here['processes']}")
    if there["images"] != here["images"]:
        problems.append("images or captions are others")
    if there.get("denoiser", here["denoiser"]) != here["denoiser"]:  # checkpoints of earlier releases have none
        model = new["pretrained_model_name_or_path"]
        problems.append(f"the config or the weights of the denoiser at {model} are others: put those back")
    if problems:
        raise InputError(
            f"--resume_from_checkpoint: {checkpoint.path} is of another run, which this one cannot go on with:\n  "
            + "\n  ".join(problems)
        )


def as_begun(
    checkpoint: Checkpoint | None, settings: DreamBoothSettings, say: Callable[[str], object]
) -> DreamBoothSettings:
    """What the run chose by itself when it began, it goes on with: the seed, and what `--memory auto` took.

    Other memory may be free than then. `say` is told of what was taken.
    """
    if checkpoint is None:
        return settings
    then = checkpoint.state["facts"]["settings"]
    begun = settings if settings.seed is not None else replace(settings, seed=then["seed"])
    if settings.memory != "auto":
        return begun
    now = asdict(settings)
    taken = {name: then[name] for name in CHOSEN_FOR_MEMORY if then.get(name, now[name]) != now[name]}
    if taken:
        say(f"--memory auto goes on with {', '.join(f'--{name} {value}' for name, value in taken.items())}.")
    return replace(begun, **taken)


def check_agreement(checkpoint: Checkpoint | None) -> None:
    """To be called in all processes. Raises InputError if not all found the same checkpoint, or none."""
    steps = gather_object([0 if checkpoint is None else checkpoint.step])
    if len(set(steps)) > 1:
        raise InputError(
            f"--resume_from_checkpoint: the processes found checkpoints of different steps, {steps} (0 is none); "
            "--output_dir must be the same folder for all machines, on a disk that they share"
        )


class Checkpoints:
    """Of one run: saves as often as the settings say, and restores the one that is continued.

    Args:
        folder: the output folder.
        limit: `--checkpoints_total_limit`.
        accelerator: its main process writes.
        facts: of [`facts_of_run`].
        subjects: how a state is shared out over the processes.
        write_weights: writes what was trained into a folder.
        resumed: what the run resumes from.
    """

    def __init__(
        self,
        folder: Path,
        limit: int | None,
        accelerator: Accelerator,
        facts: dict[str, Any],
        subjects: Subjects,
        write_weights: Callable[[Path], object],
        resumed: Checkpoint | None,
    ) -> None:
        self.folder, self.limit, self.accelerator, self.facts = folder, limit, accelerator, facts
        self.subjects, self.write_weights, self.resumed = subjects, write_weights, resumed
        self.last: Path | None = resumed.path if resumed else None

    def restore(self, state: TrainingState) -> None:
        """Puts `state` where it was."""
        if self.accelerator.is_main_process:
            remove_leftovers(self.folder)
        if self.resumed is None:
            return
        kept = self.resumed.state
        try:
            own = self.subjects.own_state(kept["trainee"], self.accelerator)
            state.load_state_dict(own, kept["losses"])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(kept["scaler"])
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(
                f"--resume_from_checkpoint: {self.resumed.path}: its {STATE} does not fit this run "
                f"({type(error).__name__}: {error}); resume from another checkpoint"
            ) from error
        self.accelerator.print(f"Resumes from {self.resumed.path}, after step {self.resumed.step}.")

    def save(self, state: TrainingState) -> None:
        """Saves; if that fails, as on a full disk, it says so, and the run goes on with the last one kept."""
        self._save(state, [self.folder])

    def save_last(self, state: TrainingState) -> str:
        """Has the state of the last step in a checkpoint, in the folder of temporary files if the run's takes none.

        Returns:
            What is safe, and how to go on.
        """
        temporary = None
        if self.last is None or self.last.name != f"checkpoint-{len(state.losses)}":
            temporary = Path(tempfile.gettempdir()) / f"coeff-{secrets.token_hex(4)}"
            self._save(state, [self.folder, temporary])
        if self.last is not None and self.last.parent == temporary:
            return (
                f"{self.last} is whole, in the folder of temporary files: move it to {self.folder}, where room must "
                "be made; then --resume_from_checkpoint latest writes what lacks."
            )
        return self.safe_text()

    def _save(self, state: TrainingState, folders: Sequence[Path]) -> None:
        """Into the first of `folders` that takes it; the output folder, or a new one in another."""
        of_all = self.subjects.gather_state(state.state_dict())
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            kept = {
                "trainee": of_all,
                "scaler": None if scaler is None else scaler.state_dict(),
                "losses": state.losses,
                "facts": self.facts,
            }

            def write_weights(folder: Path) -> None:
                with state.averaged():
                    self.write_weights(folder)

            for folder in folders:
                try:
                    folder.mkdir(exist_ok=True)
                    self.last = save_checkpoint(folder, kept, write_weights)
                except (OSError, RuntimeError, SafetensorError) as error:  # the latter two where libraries write
                    problem = f"checkpoint-{len(state.losses)} could not be written: {error}. {self.safe_text()}"
                    print(problem + (" The run goes on." if len(folders) == 1 else ""), file=sys.stderr)
                else:
                    if folder == self.folder:
                        self._remove_others(self.last)
                    break
        last = [self.last]
        broadcast_object_list(last)  # after which all have waited for the main process
        self.last = last[0]

    def _remove_others(self, newest: Path) -> None:
        try:
            keep_newest(self.folder, self.limit, newest)
        except OSError as error:  # a file in the way, or no room for the name that a checkpoint is removed under
            print(f"{newest} was written, but older checkpoints could not be removed: {error}.", file=sys.stderr)

    def safe_text(self) -> str:
        """What is not lost, and how to go on from it."""
        if self.last is None:
            return "There is no checkpoint yet."
        if self.accelerator.distributed_type is DistributedType.DEEPSPEED:
            return f"{self.last} is whole, but runs under DeepSpeed cannot be continued."
        own = self.last.resolve().parent == self.folder.resolve()
        return f"{self.last} is whole; --resume_from_checkpoint {'latest' if own else self.last} resumes from it."
