"""The process in which router.body reads long bodies: one after another, until its pipe closes."""

import sys
from multiprocessing.connection import Connection

from pydantic import BaseModel

from router.body import read
from router.config import Bounds
from router.errors import ApiError


def serve(pipe: Connection) -> None:
    while True:
        try:
            model, bounds = pipe.recv()
            body = pipe.recv_bytes()
        except EOFError:
            return
        pipe.send(_answer(model, body, bounds))


def _answer(model: type[BaseModel], body: bytes, bounds: Bounds) -> BaseModel | ApiError:
    try:
        return read(model, body, bounds)
    except ApiError as error:
        return error


if __name__ == "__main__":
    with Connection(int(sys.argv[1])) as pipe:
        serve(pipe)
