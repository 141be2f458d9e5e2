"""One Ray and one Serve for many tests: what a start costs most is paid once."""

import sys
from multiprocessing.connection import Client, Connection
from types import TracebackType
from typing import Self

from benchmarks.processes import ServerProcess, free_port, short_folder
from cluster.environment import serving_environment


class Host(ServerProcess):
    """A server that can become another one, and whose cluster can grow by a node and lose it."""

    def __init__(self) -> None:
        port, folder = free_port(), short_folder()
        self._address = str(folder / "commands")
        self._served: tuple[str, ...] | None = None
        env = {"RAY_TMPDIR": str(folder), **serving_environment(folder)}
        command = [sys.executable, "-m", "tests.e2e.host_process", str(port), self._address]
        super().__init__(command, port, "/readyz", env, folder)

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            self._commands: Connection = self.wait_for(self._connect)
        except BaseException:
            super().__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._commands.close()

    def serve(self, *arguments: str) -> Self:
        """Serves by these `key=value` of ClusterConfig, as it does already or from now on. Raises
        RuntimeError with the log's end if it does not."""
        if arguments != self._served:
            self._served = None
            self._do("serve", *arguments)
            self.wait_until_ready()
            self._served = arguments
        return self

    def add_node(self) -> None:
        self._do("add_node")

    def lose_node(self) -> None:
        self._do("lose_node")

    def _do(self, *command: str) -> None:
        """Waits until it is done. Raises RuntimeError with the log's end."""
        self._commands.send(command)
        self.wait_for(self._is_done)

    def _is_done(self) -> bool:
        try:
            return self._commands.poll() and self._commands.recv() == "done"
        except (EOFError, ConnectionError):  # it ends, which whoever waits will see
            return False

    def _connect(self) -> Connection | None:
        try:
            return Client(self._address, "AF_UNIX")
        except (FileNotFoundError, ConnectionRefusedError):
            return None
