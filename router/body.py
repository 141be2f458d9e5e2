"""Reads JSON bodies into what a route takes: the long ones in a process of their own.

A parser holds the interpreter from a body's first byte to its last, and pydantic from the first item
to the last fault, so in a thread they would stop the loop that carries the streams.
"""

import asyncio
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError

from replicas.errors import ErrorCode
from router.config import Bounds
from router.errors import ApiError, bad_request, bad_value
from router.fields import Prompted, is_deeper

INLINE_BYTES = 32 * 2**10
"""A body up to this long is read at once, which takes some milliseconds at worst."""
MAX_READ_S = 30.0
MAX_OTHER_ITEMS = 2**16
"""The most commas in a body beyond those that a prompt may have, as text or between token ids."""


def read(model: type[BaseModel], body: bytes, bounds: Bounds) -> BaseModel:
    """The body as a model. Raises ApiError, which names the field at fault."""
    max_items = bounds.max_prompt_chars + MAX_OTHER_ITEMS
    if body.count(b",") > max_items:
        raise bad_request("invalid_value", f"The body has more than {max_items} items.")
    max_depth = bounds.max_json_depth
    if is_deeper(body, max_depth):
        raise bad_request("invalid_json", f"The JSON is nested deeper than {max_depth}.")
    try:
        request = model.model_validate(json.loads(_text(body)))
    except ValidationError as error:
        raise bad_value(error.errors(include_url=False, include_input=False)[0]) from None
    except json.JSONDecodeError as error:
        raise bad_request("invalid_json", f"The body is not valid JSON: {error}.") from None
    except (ValueError, RecursionError) as error:  # a number of 4,300 digits
        raise bad_request("invalid_json", f"The body can't be read as JSON: {error}.") from None
    if isinstance(request, Prompted):
        _check_length(request, bounds.max_prompt_chars)
    return request


def _text(body: bytes) -> str:
    """The body's text. Given bytes json.loads would guess at their encoding, and take UTF-16, whose brackets
    nobody has counted; in JSON as UTF-8 no byte is zero."""
    try:
        if b"\0" not in body:
            return body.decode("utf-8-sig")
        why = "it has a zero byte"
    except UnicodeDecodeError as error:
        why = str(error)
    raise bad_request("invalid_json", f"The body is not JSON in UTF-8: {why}.")


def _check_length(request: Prompted, max_chars: int) -> None:
    """Refuses too long a prompt before a tokenizer spends time on it."""
    num_chars = request.num_prompt_chars
    if num_chars > max_chars:
        message = f"The prompt has {num_chars} characters; at most {max_chars} are taken."
        raise bad_request(ErrorCode.CONTEXT_LENGTH_EXCEEDED, message, request.prompt_param)


class BodyReader:
    """Reads bodies, a long one at a time in a process started with the first, and anew should it be lost."""

    def __init__(self, bounds: Bounds, inline_bytes: int = INLINE_BYTES, max_read_s: float = MAX_READ_S):
        self._bounds = bounds
        self._inline_bytes = inline_bytes
        self._max_read_s = max_read_s
        self._thread = ThreadPoolExecutor(1, "bodies")
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    async def read(self, model: type[BaseModel], body: bytes) -> BaseModel:
        """The body as a model. Raises ApiError: 400, or 503 should the process be lost."""
        if len(body) <= self._inline_bytes:
            return read(model, body, self._bounds)
        answer = await asyncio.get_running_loop().run_in_executor(self._thread, self._ask, model, body)
        if isinstance(answer, ApiError):
            raise answer
        return answer

    def close(self) -> None:
        """Ends the process; a body that is being read ends with a 503."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._process is not None:
            self._process.kill()
        self._thread.shutdown()
        self._drop()

    def _ask(self, model: type[BaseModel], body: bytes) -> BaseModel | ApiError:
        try:
            pipe = self._connected()
            pipe.send((model, self._bounds))
            pipe.send_bytes(body)
            if pipe.poll(self._max_read_s):
                answer: BaseModel | ApiError = pipe.recv()
                return answer
        except (EOFError, OSError):
            self._drop()
            message = "The body could not be read at the moment; try again."
            return ApiError(503, "unavailable", message, type_="service_unavailable_error", retry_after_s=1)
        self._drop()
        return bad_request("invalid_json", f"The body takes more than {self._max_read_s:g} s to read.")

    def _connected(self) -> Connection:
        if self._pipe is None:
            self._pipe, theirs = Pipe()
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "router.body_process", str(theirs.fileno())],
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
                )
        return self._pipe

    def _drop(self) -> None:
        if self._process is not None and self._pipe is not None:
            self._pipe.close()
            self._process.kill()
            self._process.wait()
        self._process = self._pipe = None


def route_with(reader: BodyReader) -> type[APIRoute]:
    """The class of routes whose JSON bodies this reader reads."""

    class ReadingRoute(APIRoute):
        def get_route_handler(self) -> Any:
            handler = super().get_route_handler()
            model = None if self.body_field is None else self.body_field.field_info.annotation

            class ReadingRequest(Request):
                async def json(self) -> Any:
                    return await reader.read(model, await self.body())  # type: ignore[arg-type]

            async def reading(request: Request) -> Any:
                return await handler(ReadingRequest(request.scope, request.receive))

            return reading

    return ReadingRoute
