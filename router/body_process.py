"""The process in which router.body reads long bodies: one after another, until its pipe closes."""

import sys
from multiprocessing.connection import Connection

from pydantic import BaseModel

from router.body import read
from router.errors import ApiError


def serve(pipe: Connection) -> None:
    while True:
        try:
            model, max_depth = pipe.recv()
            body = pipe.recv_bytes()
        except EOFError:
            return
        pipe.send(_answer(model, body, max_depth))


def _answer(model: type[BaseModel], body: bytes, max_depth: int) -> BaseModel | ApiError:
    try:
        return read(model, body, max_depth)
    except ApiError as error:
        return error


if __name__ == "__main__":
    with Connection(int(sys.argv[1])) as pipe:
        serve(pipe)
