"""What there is to choose of a server: a field is the flag, its help, its rule and its default."""

from __future__ import annotations

import argparse
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, Literal, TypeVar

from ..console import Parser
from ..quantization import MethodName
from ..training.errors import InputError
from ..training.settings.command_line import add_flag
from ..training.settings.dreambooth import Settings, flag, hints
from ..training.settings.rules import Count, NotNegative, Text, within

S = TypeVar("S", bound=Settings)
Port = Annotated[int, within("in [1, 65535]", lambda value: 1 <= value <= 65535)]

DESCRIPTION = """Serves images over HTTP: any subject of a folder by its name, different ones in one batch.

    coeff-diffusers serve --adapters subjects \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5
    curl http://127.0.0.1:8000/v1/images -H "Content-Type: application/json" --output dog.png \\
        -d '{"prompt": "a sks dog in the snow", "subject": "dog", "seed": 1, "response_format": "png"}'

http://127.0.0.1:8000/docs lists what can be asked for. It answers this machine alone, unless --host says otherwise;
then set COEFF_SERVE_TOKEN.
"""


@dataclass(frozen=True)
class PipelineSettings(Settings):
    """Pipeline"""

    pretrained_model_name_or_path: Text = flag(
        "The base model: a folder in diffusers format, a name on the Hub, or a single .safetensors file."
    )
    adapters: Text = flag(
        "Folder of the subjects' coefficient files, NAME.safetensors or NAME/pytorch_coeff_weights.safetensors; or a "
        "repository or a collection of the Hub, which can only be read."
    )
    single_file_config: Text | None = flag(
        "Of a single file: a folder in diffusers format of its kind, for what it lacks.", None
    )
    quantize: MethodName | None = flag("Hold the denoiser and the large text encoders so; docs/memory.md.", None)
    gguf_file: Text | None = flag("The denoiser's weights in a GGUF file, instead of the base model's own.", None)
    group_offload: bool = flag(
        "Keep weights in the CPU's memory, and bring each layer's for as long as it computes.", False
    )
    dtype: Literal["float32", "float16", "bfloat16"] = flag("Of the base model.", "float32")
    max_batch_size: Count = flag("Images that are made at once.", 8)
    max_resident: Count = flag("Subjects that a pipeline keeps loaded.", 1000)
    max_num_inference_steps: Count = flag("Steps that a request may ask for.", 100)
    max_image_size: Count = flag("Height and width that a request may ask for, in pixels.", 1536)


@dataclass(frozen=True)
class ServeSettings(PipelineSettings):
    """Server"""

    host: str = flag("Address to listen on; 0.0.0.0 is all of the machine's.", "127.0.0.1")
    port: Port = flag("Port to listen on.", 8000)
    token: str | None = flag(
        "Bearer token that requests must have, better given as COEFF_SERVE_TOKEN, which other users of the machine do "
        "not see.",
        None,
        secret=True,
    )
    batch_wait_timeout_s: NotNegative = flag(
        "Seconds that the first image of a batch waits for others, while the replica is idle.", 0.02
    )
    max_queued_requests: Count = flag(
        "Requests that wait at a replica; more are answered by 503, with a time to try again.", 64
    )
    max_upload_size: Count = flag("Of a coefficient file that is put, in bytes.", 8 << 20)
    num_replicas: Count = flag("Pipelines, each in a process of its own.", 1)
    num_gpus: NotNegative | None = flag(
        "GPUs of a replica, or a share of one; by default one if the machine has any.", None
    )
    num_cpus: NotNegative | None = flag(
        "CPUs of a replica, as Ray counts them; without a GPU also its threads, and all of them by default.", None
    )
    metrics_port: Port | None = flag("Port of Ray's metrics, for Prometheus.", None)
    ray_address: str | None = flag("Joins this Ray cluster ('auto' finds it) in place of starting one here.", None)


def token_of(settings: ServeSettings) -> str | None:
    """The token that requests must have: of the settings, else of COEFF_SERVE_TOKEN; `None` if neither is given.

    Raises:
        InputError: if no header could carry it. An empty one is no server that is open to all.
    """
    token = os.environ.get("COEFF_SERVE_TOKEN") if settings.token is None else settings.token
    if token is not None and re.fullmatch(r"[!-~]+", token) is None:
        raise InputError(
            "COEFF_SERVE_TOKEN, or --token, must be one or more printable characters of ASCII, without spaces; it is "
            + ("empty: unset it to ask for no token" if not token else "not (and is not shown here)")
        )
    return token


def parse_serve(argv: Sequence[str] | None = None) -> ServeSettings:
    """The settings of the command line. Raises as [`parse_flags`]."""
    return parse_flags(ServeSettings, "serve", DESCRIPTION, argv)


def parse_flags(group: type[S], command: str, description: str, argv: Sequence[str] | None = None) -> S:
    """The settings of a command of `coeff-diffusers`.

    Raises:
        InputError: if they cannot be used; every problem is listed.
        SystemExit: for help, and for flags that there are not.
    """
    parser = Parser(
        f"coeff-diffusers {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    kind: Any = group
    types: dict[str, Any] = hints(kind)
    for setting in fields(kind):
        add_flag(parser, setting, types[setting.name], False)
    given = vars(parser.parse_args(argv))
    if missing := [f"--{s.name}" for s in fields(kind) if s.default is MISSING and s.name not in given]:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    return group(**given)


def check_address(host: str, port: int) -> None:
    """Raises InputError if it cannot be listened to."""
    try:
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind((host, port))
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: {error.strerror}; give others") from error
