"""The settings of a run: fields with their rules, the command line, the YAML file, the file of many subjects."""

from .command_line import parse_settings
from .dreambooth import DreamBoothSettings

__all__ = ["DreamBoothSettings", "parse_settings"]
