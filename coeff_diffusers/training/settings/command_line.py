"""The flags of a run, made from the settings' fields."""

from __future__ import annotations

import argparse
import sys
import typing
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from ...console import Parser
from .combinations import FILLED_IN, idle_problems
from .config_file import read_config
from .dreambooth import GROUPS, DreamBoothSettings, HubSettings, LoraSettings, hints, raise_if

EXCLUSIVE = {
    "max_train_steps": "num_train_epochs",
    "num_train_epochs": "max_train_steps",
    "validation_steps": "validation_epochs",
    "validation_epochs": "validation_steps",
}
# names that other scripts have, which are also accepted: diffusers', kohya's
ALIASES = {"lora_rank": "rank", "optimizer": "optimizer_type"}
FOLDED = "--help-all"  # shows what --help names alone
FOLDED_GROUPS = (LoraSettings, HubSettings)


def parse_settings(argv: Sequence[str] | None = None) -> DreamBoothSettings:
    """The settings of the command line and of its `--config`; `None` is this process's own.

    Raises:
        InputError: if they cannot be used; every problem is listed.
        SystemExit: for help, and for flags that there are not.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = make_parser(whole=FOLDED in argv)
    given = vars(parser.parse_args(["--help" if text == FOLDED else text for text in argv]))
    config = given.pop("config", None)
    values = _under(read_config(config, hints(DreamBoothSettings)) if config else {}, given)
    missing = [f"--{s.name}" for s in fields(DreamBoothSettings) if s.default is MISSING and s.name not in values]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    settings = DreamBoothSettings(**values)
    problems = idle_problems(settings, set(FILLED_IN) & set(given))
    if not (settings.subjects or settings.instance_data_dir or settings.dataset_name):
        problems.append("give either --instance_data_dir or --dataset_name, for the subject's images")
    raise_if(problems)
    return settings


def _under(of_file: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The file's values where the command line has none, and nothing that excludes what it has."""
    for name, excluded in EXCLUSIVE.items():
        if name in given:
            of_file.pop(excluded, None)
    return of_file | given


def make_parser(whole: bool) -> argparse.ArgumentParser:
    """The parser. Its help shows every flag if `whole`, else names some groups' alone."""
    script = Path(sys.argv[0])
    parser = Parser(
        None if script.suffix == ".py" and script.stem != "__main__" else "coeff-diffusers train",
        description="Trains attention coefficients, and a LoRA if asked for, on a few images of a subject.",
        usage="%(prog)s --pretrained_model_name_or_path MODEL --instance_data_dir IMAGES --instance_prompt PROMPT "
        f"--output_dir RESULT [flags]\n       %(prog)s {FOLDED}   shows every flag",
        argument_default=argparse.SUPPRESS,  # what is not given may stand in the file
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings. Flags given beside it win over it.")
    for group in GROUPS:
        names = [setting.name for setting in fields(group)]
        folded = [name for name in names if not whole and (group in FOLDED_GROUPS or name.startswith("prodigy_"))]
        also = f"{FOLDED} shows {', '.join(f'--{name}' for name in folded)}." if folded else None
        section = parser.add_argument_group(str(group.__doc__), also)
        types = hints(DreamBoothSettings)
        for setting in fields(group):
            add_flag(section, setting, types[setting.name], setting.name in folded)
    return parser


class _Switch(argparse.Action):
    """`--name` and `--no_name`."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, not str(option_string).startswith("--no_"))


def add_flag(section: Any, setting: Field[Any], hint: Any, folded: bool) -> None:
    name, kind, many, choices = setting.name, *_shape(hint)
    shown = "" if setting.default in (MISSING, None, (), "") or kind is bool else f" Default: {_default(setting)}."
    on = " Default: on." if kind is bool and setting.default else ""
    help_text = argparse.SUPPRESS if folded else (setting.metadata["help"] + shown + on).replace("%", "%%")
    if kind is bool:
        section.add_argument(f"--{name}", f"--no_{name}", nargs=0, action=_Switch, help=help_text)
        return
    section.add_argument(
        f"--{name}",
        *([f"--{ALIASES[name]}"] if name in ALIASES else []),
        dest=name,
        type=str.lower if choices and not many else kind,
        nargs="+" if many else None,
        choices=choices,
        help=help_text,
        metavar=None if choices else name.rpartition("_")[2].upper(),
    )


def _default(setting: Field[Any]) -> str:
    return " ".join(setting.default) if isinstance(setting.default, tuple) else str(setting.default)


def _shape(hint: Any) -> tuple[type, bool, tuple[str, ...] | None]:
    """Of a setting's type: that of a value, whether there may be several, and its choices."""
    while typing.get_origin(hint) is not None:
        arguments = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        if typing.get_origin(hint) is Literal:
            return str, False, tuple(arguments)
        if typing.get_origin(hint) is tuple:
            kind, _, choices = _shape(arguments[0])
            return kind, True, choices
        if typing.get_origin(hint) is Annotated or len(arguments) == 1:
            hint = arguments[0]
            continue
        break
    return hint, False, None
