"""What BoundedProcess runs in the tests: harmless stand-ins for a compile that goes wrong."""

import os
import time
from collections.abc import Callable

from replicas.grammar import Verdict, Vocabulary, prover
from replicas.messages import JsonFormat


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
