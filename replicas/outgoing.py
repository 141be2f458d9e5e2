"""What goes out on a socket of an event loop, sent from any thread."""

import asyncio
import os
import socket
import threading

MAX_WAITING_BYTES = 64 * 2**20
"""What may wait for a peer that reads too slowly, before it is given up."""


class Outgoing:
    """Sends bytes in their order, at once where the socket takes them; the rest when the event loop finds
    room. Made, ended and closed on the loop.

    transport: reads from the same socket; it is told to close after the end, and to abort where more waits
    than MAX_WAITING_BYTES. Nothing may be written to it.

    So a thread that has something to say to the peer wakes nobody else for it.
    """

    def __init__(self, transport: asyncio.Transport):
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        # A descriptor of its own: the transport closes its one while another thread may be sending.
        self._socket = socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))
        self._socket.setblocking(False)
        self._lock = threading.Lock()
        self._waiting = bytearray()
        self._has_ended = False

    def send(self, data: bytes) -> None:
        """Sends data; from any thread. Never blocks, and raises nothing: that the peer has gone, the
        transport says."""
        with self._lock:
            if self._has_ended:
                return
            if self._waiting:
                self._waiting += data
                if len(self._waiting) > MAX_WAITING_BYTES:
                    self._has_ended = True
                    self._loop.call_soon_threadsafe(self._transport.abort)
                return
            num_sent = self._send_now(data)
            if num_sent < len(data):
                self._waiting += memoryview(data)[num_sent:]
                self._loop.call_soon_threadsafe(self._await_room)

    def end(self) -> None:
        """Closes the transport once all is sent."""
        with self._lock:
            self._has_ended = True
            if not self._waiting:
                self._transport.close()

    def close(self) -> None:
        """Drops what waits and all that comes. To be called when the transport is aborted or has closed."""
        with self._lock:
            self._has_ended = True
            self._waiting.clear()
            if self._socket.fileno() >= 0:
                self._loop.remove_writer(self._socket)
                self._socket.close()

    def _await_room(self) -> None:
        if self._socket.fileno() >= 0:
            self._loop.add_writer(self._socket, self._send_waiting)

    def _send_waiting(self) -> None:
        with self._lock:
            del self._waiting[: self._send_now(self._waiting)]
            if not self._waiting:
                self._loop.remove_writer(self._socket)
                if self._has_ended:
                    self._transport.close()

    def _send_now(self, data: bytes | bytearray) -> int:
        """Sends what the socket takes, and returns how many bytes that is."""
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            return len(data)  # the peer has gone
