"""The engine's thread: commands between two steps, steps while there is work, and its death.

The engine and what is kept of its requests (replicas.requests) belong to this thread alone, which touches
them in commands and steps. Any thread may call the methods of an EngineThread; of these `call`, `state` and
`stop` are coroutines, for an event loop.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any, TypeVar

from policies.failures import Failures
from replicas.engine.engine import Engine
from replicas.engine.sequence import Progress
from replicas.errors import ErrorCode, TriadError
from replicas.stats import EngineSnapshot

logger = logging.getLogger(__name__)
T = TypeVar("T")

WEDGED_S = 120.0
"""The time after which a forward counts as hung."""
SNAPSHOT_S = 0.01
"""The time for which a snapshot is good enough while steps follow one another: taking one is a quarter of a
small step's Python, and they are read five times a second."""


class EngineThread:
    """Runs an engine on a thread of its own.

    clock: seconds, monotonic; the engine's.
    on_progress: called on the thread with what each step made.
    on_death: called on it once, when it dies of an error; the engine is not to be asked any more.
    """

    def __init__(
        self,
        engine: Engine,
        replica_id: str,
        clock: Callable[[], float],
        on_progress: Callable[[list[Progress]], None],
        on_death: Callable[[], None],
    ):
        self._engine = engine
        self._replica_id = replica_id
        self._clock = clock
        self._on_progress = on_progress
        self._on_death = on_death
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._command_failures = Failures("a command to the engine")
        self._snapshot_failures = Failures("reading the engine's load")
        self._snapshot = EngineSnapshot.read(engine, replica_id)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._snapshot_due_s = clock()
        self._step_began_s: float | None = None
        self._death: BaseException | None = None
        self._is_stopping = False

    @property
    def snapshot(self) -> EngineSnapshot:
        """The engine's load and totals after the last step or command, or after one SNAPSHOT_S before."""
        return self._snapshot

    @property
    def silent_s(self) -> float:
        """The time since the forward under way began, or since the thread died; 0 between steps."""
        began_s = self._step_began_s
        return 0.0 if began_s is None else self._clock() - began_s

    @property
    def has_commands(self) -> bool:
        """True if commands wait for the step under way to end."""
        return not self._commands.empty()

    def start(self) -> None:
        self._thread.start()

    async def stop(self, last: Callable[[], None]) -> None:
        """Refuses calls from now on, runs a last command and ends the thread."""
        self._is_stopping = True
        self.put(last)
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    def check(self) -> None:
        """Raises RuntimeError when the thread has died or a forward hangs."""
        if self._death is not None:
            raise RuntimeError(f"the engine's thread died: {self._death!r}")
        if self.silent_s > WEDGED_S:
            raise RuntimeError(f"a forward has been running for more than {WEDGED_S:g} s")
        if not self._thread.is_alive() and not self._is_stopping:
            raise RuntimeError("the engine's thread has ended")

    def put(self, command: Callable[[], None]) -> None:
        """Has a command run between two steps, after those put before. Does not wait for it."""
        self._commands.put(command)

    async def call(self, command: Callable[[], T]) -> T:
        """Runs a command between two steps, and returns or raises what it does.

        Raises TriadError: UNAVAILABLE from an engine that has died or is to stop, INTERNAL for an error that
        is none.
        """
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return  # its caller has gone
            try:
                if self._death is not None:
                    raise TriadError(ErrorCode.UNAVAILABLE, "the replica's engine has failed")
                future.set_result(command())
            except TriadError as error:
                future.set_exception(error)
            except BaseException as error:
                logger.exception("a command to the engine failed")
                message = f"the replica could not do it ({type(error).__name__})"
                future.set_exception(TriadError(ErrorCode.INTERNAL, message))

        if self._is_stopping:
            raise TriadError(ErrorCode.UNAVAILABLE, "the replica is shutting down")
        self.put(run)
        return await asyncio.wrap_future(future)

    async def state(self) -> dict[str, Any]:
        """The plan under way and what runs, for people to read. Raises TriadError as `call` does."""
        return await self.call(self._state)

    # The rest runs on the thread itself.

    def _run(self) -> None:
        try:
            while self._run_commands():
                began_s = self._step_began_s = self._clock()
                progress = self._engine.step()
                self._step_began_s = None
                self._on_progress(progress)
                if began_s >= self._snapshot_due_s or not self._engine.has_work:
                    self._take_snapshot()
        except BaseException as error:
            logger.exception("the engine's thread died")
            self._die(error)
            while (command := self._commands.get()) is not None:
                with self._command_failures:
                    command()

    def _run_commands(self) -> bool:
        """Runs the commands that wait; blocks for one when there is no work. False for the order to stop."""
        while True:
            try:
                command = self._commands.get(block=not self._engine.has_work)
            except queue.Empty:
                return True
            if command is None:
                return False
            with self._command_failures:
                command()
            self._take_snapshot()

    def _die(self, error: BaseException) -> None:
        self._death = error
        if self._step_began_s is None:
            self._step_began_s = self._clock()  # silent from now on
        self._on_death()

    def _take_snapshot(self) -> None:
        with self._snapshot_failures:
            self._snapshot = EngineSnapshot.read(self._engine, self._replica_id)
            self._snapshot_due_s = self._clock() + SNAPSHOT_S

    def _state(self) -> dict[str, Any]:
        scheduler = self._engine.scheduler
        plan = self._engine.active_plan
        return {
            "replica": self._replica_id,
            "plan": {**asdict(plan.decode), "rule": plan.rule},
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "pages_used": scheduler.pages_used,
            "tokens_by_mode": dict(scheduler.counters.tokens_by_mode),
            "forwards_by_mode": dict(scheduler.counters.forwards_by_mode),
        }
