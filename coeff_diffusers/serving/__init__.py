"""A server of images: one pipeline a replica, the subjects of a folder, requests for different ones in one batch.

    coeff-diffusers serve --adapters subjects \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5

Ray Serve runs it: replicas, queues, batches and metrics are Ray's. A config file for a cluster imports `build`.
"""

from typing import Any


def build(arguments: dict[str, Any]) -> Any:
    """The application for `serve run`, `serve deploy` and config files (`import_path: coeff_diffusers.serving:build`).

    Args:
        arguments: the settings of `coeff-diffusers serve`, by name.

    Returns:
        A `ray.serve.Application` of two deployments, `Api` and `Images`, whose replicas hold a pipeline each.

    Raises:
        InputError: if the settings cannot be used; every problem is listed.
    """
    from .api import application
    from .settings import ServeSettings

    return application(ServeSettings(**arguments))
