"""Protection against other pages and other machines: the checks of Host and Origin, and the headers of every response.

The server listens on 127.0.0.1, but any page that is open in the same browser can send requests there. A foreign name
that resolves to 127.0.0.1 (DNS rebinding) is refused by the Host header. A request from another page is refused by the Origin
header, which browsers send with every request that changes something, and which pages cannot set.
"""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HOSTS = ["127.0.0.1", "localhost"]
# Everything from this server only: 'wasm-unsafe-eval' lets onnxruntime-web compile WebAssembly, but not run text as a script.
POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self' 'wasm-unsafe-eval'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class TooLarge(Exception):
    """A request with more bytes than its route takes."""


async def read_body(request: Request, limit: int) -> bytes:
    """The body of a request. Raises `TooLarge` as soon as it is known to have more than `limit` bytes."""
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        raise TooLarge(f"the request has {int(length):,} bytes, at most {limit:,} are allowed; send a smaller file")
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > limit:
            raise TooLarge(f"the request has more than the {limit:,} bytes that are allowed; send a smaller file")
    return bytes(content)


class SameOrigin:
    """Refuses requests that may change something and do not come from a page of this server."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD"):
            headers = Headers(scope=scope)
            expected = f"{scope['scheme']}://{headers.get('host', '')}"
            if headers.get("origin") != expected:
                text = f"the request does not come from a page of this server; open {expected}/ and use that"
                await JSONResponse({"error": text}, 403)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class WithHeaders:
    """Adds `HEADERS` to every response, refusals included."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self._app(scope, receive, send_with_headers if scope["type"] == "http" else send)


MIDDLEWARE = [
    Middleware(WithHeaders),
    Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS, www_redirect=False),
    Middleware(SameOrigin),
]
