"""One Ray and one Serve for many tests: what a start costs most is paid once."""

import sys
from multiprocessing.connection import Client, Connection
from types import TracebackType
from typing import Self

from benchmarks.processes import ServerProcess, free_port, short_folder
from cluster.environment import serving_environment

SERVES_WITHIN_S = 240.0


class Host(ServerProcess):
    """A server that can become another one: `serve` takes the `key=value` of ClusterConfig."""

    def __init__(self) -> None:
        port, folder = free_port(), short_folder()
        self._address = str(folder / "commands")
        self._serves: tuple[str, ...] | None = None
        env = {"RAY_TMPDIR": str(folder), **serving_environment(folder)}
        command = [sys.executable, "-m", "tests.e2e.host_process", str(port), self._address]
        super().__init__(command, port, "/readyz", env, folder)

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            self._process_connection: Connection = self.wait_for(self._connect)
        except BaseException:
            super().__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._process_connection.close()

    def serve(self, *arguments: str) -> Self:
        """Serves by these arguments, as it does already or from now on. Raises RuntimeError with the log's
        end if it does not."""
        if arguments != self._serves:
            self._serves = None
            self._process_connection.send(arguments)
            self.wait_for(self._has_deployed, SERVES_WITHIN_S)
            self.wait_until_ready()
            self._serves = arguments
        return self

    def _connect(self) -> Connection | None:
        try:
            return Client(self._address, "AF_UNIX")
        except (FileNotFoundError, ConnectionRefusedError):
            return None

    def _has_deployed(self) -> bool:
        try:
            return self._process_connection.poll() and self._process_connection.recv() == ()
        except (EOFError, ConnectionError):
            self.process.wait()
            return False
