"""Starts Ray and the server, and ends both."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

# A cluster that is started here is heard by this machine alone, as Ray has it on Windows and Macs, and tells its
# makers nothing, unless you say otherwise. Ray reads these when it is imported.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray import serve

from ..store import AdapterStore
from ..training.errors import InputError
from .api import application, resources
from .pipeline import check_base_model
from .settings import ServeSettings, check_address, token_of

NAME = "coeff_diffusers"  # of the application


def run(settings: ServeSettings) -> None:
    """Serves until SIGINT or SIGTERM asks it to stop, which may be while it starts.

    Raises:
        InputError: if there is no such model, or folder or repository of subjects, the token, the port or the
            place for the replicas cannot be had, or they do not start.
    """
    settings = replace(here(settings), token=token_of(settings))  # replicas elsewhere have another environment
    names = checked_names(settings)
    try:
        stop_on(signal.default_int_handler)
        start_ray(settings)
        stop_on(signal.default_int_handler)  # in place of Ray's
        serve.start(http_options={"host": settings.host, "port": settings.port})
        serve.run(application(settings), name=NAME, route_prefix="/")
        if settings.token is None and settings.host not in ("127.0.0.1", "localhost", "::1"):
            print(f"warning: who reaches {settings.host} may ask, put and delete; set COEFF_SERVE_TOKEN", flush=True)
        print(f"{len(names)} subjects at http://{settings.host}:{settings.port}/docs; Ctrl-C stops", flush=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        pass
    except RuntimeError as error:  # of replicas that do not start; what each of them said is above it
        raise InputError(f"the server did not start: {error}") from error
    finally:
        stop_on(signal.SIG_IGN)  # once is enough
        shut_down(settings)


def stop_on(handler: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def start_ray(settings: ServeSettings) -> None:
    """Raises InputError if there is no such cluster, or this machine has no place for the replicas."""
    try:
        ray.init(**ray_options(settings))
    except (ConnectionError, ValueError) as error:
        raise InputError(f"--ray_address {settings.ray_address}: {error}") from error
    if settings.ray_address is None:  # another cluster may grow
        check_room(settings, ray.cluster_resources())


def check_room(settings: ServeSettings, room: dict[str, float]) -> None:
    """Raises InputError if the replicas do not fit in what Ray has: they would be waited for without end."""
    for flag, each in resources(settings).items():
        what = flag.removeprefix("num_").removesuffix("s").upper()
        if each * settings.num_replicas > room.get(what, 0):
            raise InputError(
                f"--num_replicas {settings.num_replicas} of {each:g} {what} each do not fit in this machine's "
                f"{room.get(what, 0):g}; --{flag} takes less, also a share of one"
            )


def shut_down(settings: ServeSettings) -> None:
    """Ends what was started. A cluster that was joined stays, with the other applications that it serves."""
    if ray.is_initialized():
        if settings.ray_address is None:
            serve.shutdown()
        elif NAME in serve.status().applications:
            serve.delete(NAME)
    ray.shutdown()  # also of what was begun


def checked_names(settings: ServeSettings) -> list[str]:
    """The subjects that there are. What can be told before Ray starts is told here."""
    check_base_model(settings, here=settings.ray_address is None)
    try:
        names = AdapterStore(settings.adapters).names()
    except (OSError, ValueError) as error:
        raise InputError(f"--adapters: {settings.adapters} is no folder here, and no repository: {error}") from error
    check_address(settings.host, settings.port)
    return names


def here(settings: ServeSettings) -> ServeSettings:
    """With folders from the root on, for replicas run elsewhere."""
    folders: dict[str, Any] = {
        name: str(Path(value).absolute())
        for name in ("pretrained_model_name_or_path", "adapters", "single_file_config", "gguf_file")
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
