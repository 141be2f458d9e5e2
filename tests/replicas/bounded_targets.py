"""What BoundedProcess runs in the tests: harmless stand-ins for a compile that goes wrong."""

import ctypes
import os
import time
from collections.abc import Callable

from replicas.answer_forms import JsonFormat
from replicas.grammar import Verdict, Vocabulary, prover


def stack_bytes() -> int:
    """Of the thread that asks, by glibc."""
    libc, attributes, size = ctypes.CDLL(None), ctypes.create_string_buffer(256), ctypes.c_size_t()
    libc.pthread_self.restype = ctypes.c_void_p
    assert libc.pthread_getattr_np(ctypes.c_void_p(libc.pthread_self()), attributes) == 0
    assert libc.pthread_attr_getstacksize(attributes, ctypes.byref(size)) == 0
    libc.pthread_attr_destroy(attributes)
    return size.value


def misbehaving(setup: str) -> Callable[[str], str]:
    """Calls that do what they are told."""
    if setup == "fails to start":
        raise ValueError("no setup")

    def call(told: str) -> str:
        if told == "never comes back":
            while True:
                pass
        if told == "sleeps":
            time.sleep(3600)
        if told == "eats memory":
            kept = []
            while True:
                kept.append(bytearray(2**22))
        if told == "dies":
            os.abort()
        if told == "stack":
            return str(stack_bytes())
        if told == "raises":
            raise KeyError(told)
        return f"{setup} {told} {os.getpid()}"

    return call


def prover_with_traps(vocabulary: Vocabulary) -> Callable[[JsonFormat], Verdict]:
    """The real one, but for schemas whose title says what they do."""
    prove, misbehave = prover(vocabulary), misbehaving("trap")

    def call(asked: JsonFormat) -> Verdict:
        for trap in ("never comes back", "sleeps", "eats memory", "dies"):
            if trap in asked.schema:
                misbehave(trap)
        return prove(asked)

    return call


def prover_of_sizes(vocabulary: Vocabulary) -> Callable[[JsonFormat], Verdict]:
    """Finds all schemas good, and large."""
    return lambda asked: Verdict(None, (200 if "large" in asked.schema else 100) * 2**20)
