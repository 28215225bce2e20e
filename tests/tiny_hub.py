"""As much of the Hugging Face hub as an upload of small files needs, on this machine."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


class Hub(BaseHTTPRequestHandler):
    """What was sent is kept in the server."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.path, body))  # type: ignore[attr-defined]
        if self.path.endswith("/api/repos/create"):
            self._answer({"url": f"{self.server.address}/me/any-rank", "id": "me/any-rank", "name": "me/any-rank"})  # type: ignore[attr-defined]
        elif "preupload" in self.path:
            files = json.loads(body)["files"]
            self._answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        else:
            files = self.server.files  # type: ignore[attr-defined]
            for line in map(json.loads, body.splitlines() if "/commit/" in self.path else ()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del files[line["value"]["path"]]
            self._answer(
                {"commitUrl": f"{self.server.address}/me/any-rank/commit/1", "commitOid": "1", "success": True}
            )  # type: ignore[attr-defined]

    def do_GET(self) -> None:
        if "/tree/" not in self.path:
            self._answer({"id": "me/any-rank", "sha": "0", "siblings": []})
        elif self.server.lists:  # type: ignore[attr-defined]
            files = self.server.files.items()  # type: ignore[attr-defined]
            self._answer([{"type": "file", "path": path, "size": len(data), "oid": "0"} for path, data in files])
        else:
            self._answer({"error": "you may not read this"}, 403)

    def _answer(self, content: Any, status: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None: ...


@contextmanager
def tiny_hub() -> Iterator[Any]:
    """A server with an ``address``.

    Its ``requests`` are all that was sent, as path and body; its ``files`` are what its one repository holds. It does
    not list them where ``lists`` is False.
    """
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.lists = {}, True
    server.requests, server.address = [], f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        patch.setenv("HF_TOKEN", "hf_xxx")
        yield server
    server.shutdown()


def sent_files(server: Any) -> dict[str, bytes]:
    """The files of its only commit."""
    (commit,) = [body for path, body in server.requests if "/commit/" in path]
    values = [line["value"] for line in map(json.loads, commit.splitlines()) if line["key"] == "file"]
    return {value["path"]: base64.b64decode(value["content"]) for value in values}
