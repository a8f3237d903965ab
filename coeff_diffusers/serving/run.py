"""Starts Ray and the server, and ends both."""

from __future__ import annotations

import os
import signal
import socket
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

# A cluster that is started here is heard by this machine alone, as Ray has it on Windows and Macs, and tells its
# makers nothing, unless you say otherwise. Ray reads these when it is imported.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from diffusers import DiffusionPipeline
from ray import serve

from ..training.errors import InputError
from ..training.families.single_file import is_single_file
from .api import application
from .folder import SubjectFolder
from .settings import ServeSettings


def run(settings: ServeSettings) -> None:
    """Serves until SIGINT or SIGTERM asks it to stop.

    Raises:
        InputError: if there is no such model, or folder or repository of subjects, the port cannot be had, or the
            replicas do not start.
    """
    settings = here(settings)
    names = checked_names(settings)
    ray.init(**ray_options(settings))
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # in place of Ray's
        signal.signal(number, lambda *_: stop.set())
    try:
        serve.start(http_options={"host": settings.host, "port": settings.port})
        serve.run(application(settings), name="coeff_diffusers", route_prefix="/")
        print(f"{len(names)} subjects at http://{settings.host}:{settings.port}/docs; Ctrl-C stops", flush=True)
        stop.wait()
    except RuntimeError as error:  # of replicas that do not start; what each of them said is above it
        raise InputError(f"the server did not start: {error}") from error
    finally:
        serve.shutdown()
        ray.shutdown()


def checked_names(settings: ServeSettings) -> list[str]:
    """The subjects that there are. What can be told before Ray starts is told here."""
    model = settings.pretrained_model_name_or_path
    try:
        if not is_single_file(model):
            DiffusionPipeline.load_config(model)
    except (OSError, ValueError) as error:
        raise InputError(f"--pretrained_model_name_or_path: {error}") from error
    try:
        names = SubjectFolder(settings.adapters).names()
    except (OSError, ValueError) as error:
        raise InputError(f"--adapters: {settings.adapters} is no folder here, and no repository: {error}") from error
    try:
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind((settings.host, settings.port))
    except OSError as error:
        raise InputError(f"--host {settings.host} --port {settings.port}: {error.strerror}; give others") from error
    return names


def here(settings: ServeSettings) -> ServeSettings:
    """With folders from the root on, for replicas run elsewhere."""
    folders: dict[str, Any] = {
        name: str(Path(value).absolute())
        for name in ("pretrained_model_name_or_path", "adapters", "single_file_config")
        if (value := getattr(settings, name)) is not None and Path(value).exists()
    }
    return replace(settings, **folders)


def ray_options(settings: ServeSettings) -> dict[str, Any]:
    """Of `ray.init`."""
    if settings.ray_address is not None:
        return {"address": settings.ray_address}
    return {
        "_metrics_export_port": settings.metrics_port,
        "include_dashboard": False,
        "logging_level": "WARNING",
        "object_store_memory": 1 << 28,
    }
