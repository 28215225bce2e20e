"""Who may ask for the page, and for what of it.

Gradio's server can do more than this page needs: take files, hand out files, fetch addresses. A gate before it lets
through only what the page itself asks for, and nothing that another page makes a browser ask for. Its header keeps the
browser from asking any other host.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import uvicorn

from matryoshka_lora.errors import MatryoshkaError

_WHOLE = ("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/gradio_api/cancel", "/gradio_api/reset")
_BEGIN = ("/assets/", "/static/", "/gradio_api/queue/", "/gradio_api/heartbeat/")

_POLICY = (
    # Gradio's components are made in the browser, from code that is text.
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'none'; base-uri 'self'; form-action 'self'"
)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach a host."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address; port 0 is any free one.

    Raises:
        MatryoshkaError: The address is in use, or is none of this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        raise MatryoshkaError(
            f"cannot listen at port {port} of {host}: {reason}. Choose another with --port, 0 for any that is "
            "free; --host is 127.0.0.1 unless other machines are to reach the page"
        ) from error


def address(listening: socket.socket) -> str:
    """The address that a browser is given."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def gated(app: App, only_here: bool) -> App:
    """An ASGI application that answers only what its own page asks.

    Args:
        app: Gradio's.
        only_here: Whether a request must name this machine's loopback: a name that somebody else has bound to its
            address is refused.
    """

    async def gate(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin, path = headers.get("host", ""), headers.get("origin"), scope["path"]
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        foreign = origin is not None and origin.partition("://")[2] != host
        if scope["type"] != "http" or foreign or (only_here and not is_loopback(name.strip("[]"))):
            await _refuse(send, 403)
        elif path not in _WHOLE and not path.startswith(_BEGIN):
            await _refuse(send, 404)
        else:
            await app(scope, receive, _with_policy(send))

    return gate


def run(app: App, listening: socket.socket) -> None:
    """Answer until Ctrl-C."""
    # Pages that are open then are cut off, of which uvicorn would write a traceback.
    config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[listening])


async def _refuse(send: Send, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def _with_policy(send: Send) -> Send:
    async def send_on(message: Message) -> None:
        if message["type"] == "http.response.start":
            more = [(b"content-security-policy", _POLICY.encode()), (b"x-content-type-options", b"nosniff")]
            message = {**message, "headers": [*message.get("headers", ()), *more]}
        await send(message)

    return send_on
