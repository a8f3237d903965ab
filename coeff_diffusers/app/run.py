"""Starts the app, and ends it with all that runs in it."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when Gradio is imported: it tells its makers nothing

from ..console import hush
from ..serving.pipeline import check_base_model
from ..serving.settings import check_address
from ..training.errors import InputError
from .page import CSS, page, theme
from .pipeline import SharedPipeline
from .settings import AppSettings
from .visitors import Visitors

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def run(settings: AppSettings) -> None:
    """Answers until SIGINT or SIGTERM asks it to stop, which may be while it starts.

    Raises:
        InputError: if there is no such model, or folder or repository of subjects, or the port cannot be had.
    """
    app = None
    try:
        stop_on(signal.default_int_handler)
        app = App(settings)
        app.start()
        stop_on(signal.default_int_handler)  # in place of Gradio's
        if settings.host not in LOOPBACK:
            print(f"warning: who reaches {settings.host} may use it: create, upload and train", flush=True)
        print(f"{app.address}  Ctrl-C stops", flush=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        pass
    finally:
        stop_on(signal.SIG_IGN)  # once is enough
        if app is not None:
            app.close()


def stop_on(handler: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


class App:
    """The app of some settings; several can run in one process, on ports of their own."""

    def __init__(self, settings: AppSettings) -> None:
        check_address(settings.host, settings.port)
        hush()
        self.settings = settings
        check_base_model(settings)
        try:
            self.shared = SharedPipeline(settings)
            self.shared.names()
        except (OSError, ValueError) as error:
            raise InputError(f"--pretrained_model_name_or_path, --adapters: {error}") from error
        self.visitors = Visitors(self.shared)
        self.blocks = page(self.shared, self.visitors)
        self.address = ""

    def start(self) -> None:
        """Answers from now on, in threads of its own."""
        options: dict[str, Any] = {"default_concurrency_limit": 20, "max_size": 100, "api_open": False}
        self.blocks.queue(**options)
        _, self.address, _ = self.blocks.launch(
            server_name=self.settings.host,
            server_port=self.settings.port,
            max_file_size=self.settings.max_upload_size,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            enable_monitoring=False,
            run_history=False,
            footer_links=[],
            theme=theme(),
            css=CSS,
        )

    def close(self) -> None:
        """Ends training runs, with a checkpoint, and the server."""
        self.visitors.close()
        self.blocks.close(verbose=False)
