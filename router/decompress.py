"""Bodies that come compressed, read within the bound on a body."""

import zlib

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.errors import ApiError, api_error_response, bad_request

PIECE_BYTES = 64 * 2**10
"""The most that is decompressed at a time, some tenths of a millisecond of work."""
_GZIP = 16 + zlib.MAX_WBITS
_NONE = frozenset({"", "identity"})
_KNOWN = frozenset({"gzip", "x-gzip"})


class Decompression:
    """ASGI middleware: a body with Content-Encoding gzip is decompressed; another encoding is a 415.

    max_bytes: of the decompressed body, beyond which it is a 413
    """

    def __init__(self, app: ASGIApp, max_bytes: int):
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        encoding = _encoding(scope) if scope["type"] == "http" else ""
        if encoding in _NONE:
            await self._app(scope, receive, send)
        elif encoding in _KNOWN:
            await self._app(scope, _Gunzip(receive, self._max_bytes), send)
        else:
            message = (
                f"The body's Content-Encoding '{encoding}' is not supported; send it as it is, or as gzip."
            )
            error = ApiError(415, "unsupported_encoding", message)
            await api_error_response(error, scope["path"])(scope, receive, send)


class _Gunzip:
    """An ASGI receive() whose body is what the other one's decompresses to."""

    def __init__(self, receive: Receive, max_bytes: int):
        self._receive = receive
        self._left = max_bytes
        self._max_bytes = max_bytes
        self._inflate = zlib.decompressobj(_GZIP)
        self._waiting = b""
        self._has_more = True

    async def __call__(self) -> Message:
        while self._has_more or self._waiting:
            if not self._waiting:
                message = await self._receive()
                if message["type"] != "http.request":
                    return message
                self._waiting = message.get("body", b"")
                self._has_more = message.get("more_body", False)
            piece = self._next_piece()
            is_last = not self._has_more and not self._waiting
            if is_last and not self._inflate.eof:
                raise bad_request("invalid_body", "The gzip body ends before its end.")
            if piece or is_last:
                return {"type": "http.request", "body": piece, "more_body": not is_last}
        return await self._receive()

    def _next_piece(self) -> bytes:
        try:
            piece = self._inflate.decompress(self._waiting, PIECE_BYTES)
        except zlib.error as error:
            raise bad_request("invalid_body", f"The body is not gzip, as its header says: {error}.") from None
        if self._inflate.unused_data:
            raise bad_request("invalid_body", "The gzip body goes on after its end.")
        self._waiting = self._inflate.unconsumed_tail
        self._left -= len(piece)
        if self._left < 0:
            raise HTTPException(413, f"the body is over {self._max_bytes} bytes once decompressed")
        return piece


def _encoding(scope: Scope) -> str:
    values = [value.decode("latin-1") for name, value in scope["headers"] if name == b"content-encoding"]
    return ", ".join(values).strip().lower()
