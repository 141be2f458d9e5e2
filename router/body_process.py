"""The process in which router.body reads long bodies: one after another, until its pipe closes."""

import pickle
import sys
from multiprocessing.connection import Connection

from pydantic import BaseModel

from router.body import read
from router.config import Bounds
from router.errors import ApiError, bad_request


def serve(pipe: Connection) -> None:
    while True:
        try:
            model, bounds = pipe.recv()
            body = pipe.recv_bytes()
        except EOFError:
            return
        pipe.send_bytes(_pickled(_answer(model, body, bounds)))


def _answer(model: type[BaseModel], body: bytes, bounds: Bounds) -> BaseModel | ApiError:
    try:
        return read(model, body, bounds)
    except ApiError as error:
        return error


def _pickled(answer: BaseModel | ApiError) -> bytes:
    """What can't be sent back is its body's fault, and costs no other one's reading."""
    try:
        return pickle.dumps(answer, pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # pickle raises whatever the values' classes do, and RecursionError
        return pickle.dumps(bad_request("invalid_json", f"The body can't be read: {error}."))


if __name__ == "__main__":
    with Connection(int(sys.argv[1])) as pipe:
        serve(pipe)
