"""A server that answers as the Hub does to those who push."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from huggingface_hub import constants

from coeff_diffusers.training.results import hub


class Hub(BaseHTTPRequestHandler):
    """Creates repositories of the user `me`, takes commits whose files stand in the request, serves model cards."""

    requests: list[tuple[str, str | None]]
    files: dict[str, bytes]
    cards: dict[str, bytes]
    refuse: str

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.requests.append((self.path, self.headers["Authorization"]))
        address = f"http://{self.headers['Host']}/me/fox"
        if self.refuse and self.refuse in self.path:
            return self.answer({"error": "You don't have the rights"}, status=403)
        if self.path == "/api/repos/create":
            return self.answer({"url": address, "name": json.loads(body)["name"]})
        if "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            return self.answer(
                {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
            )
        if "/commit/" in self.path:
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer({"commitOid": "0" * 40, "commitUrl": f"{address}/commit/{'0' * 40}", "success": True})
        return self.answer({"errors": [], "warnings": []})  # of the model card's first lines

    def do_GET(self) -> None:
        name = self.path.removeprefix("/").removesuffix("/resolve/main/README.md")
        if name in self.cards:
            return self.send(self.cards[name], {"ETag": '"1"', "X-Repo-Commit": "0" * 40})
        self.answer({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET  # noqa: N815

    def answer(self, content: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})}, status)

    def send(self, data: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hub_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Hub]]:
    handler = type("Handler", (Hub,), {"requests": [], "files": {}, "cards": {}, "refuse": ""})
    listening = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=listening.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{listening.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(hub, "get_token", lambda: None)
    yield handler
    listening.shutdown()
    listening.server_close()
