"""Pinned host memory for what goes to the device and what comes back, a few buffers in turn."""

import numpy as np
import torch

from replicas.model.cuda.inputs import HostStep, StepSize

_NUM_BUFFERS = 6
"""A step has three copies, and two steps are queued."""


class Event:
    """A mark in the queue of the device's work, to wait for; on a CPU there is nothing to wait for."""

    def __init__(self, device: torch.device):
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()


class Staging:
    """Copies to a device that do not wait for it: a buffer is written again once its copy is done."""

    def __init__(self, device: torch.device):
        self._device = device
        self._buffers = [self._allocate(1024) for _ in range(_NUM_BUFFERS)]
        self._copied: list[Event | None] = [None] * _NUM_BUFFERS
        self._turn = 0

    def send_step(self, host: HostStep, size: StepSize, target: torch.Tensor | None) -> torch.Tensor:
        """Sends the step into target [N] int32, or into a new tensor of the step's own length."""
        buffer = self._next(host.num_ints(size))
        used = host.write(buffer.numpy(), size)
        return self._send(buffer[:used], target)

    def send(self, numbers: np.ndarray) -> torch.Tensor:
        """Sends numbers [n] int32 into a new tensor."""
        buffer = self._next(len(numbers))
        buffer.numpy()[: len(numbers)] = numbers
        return self._send(buffer[: len(numbers)], None)

    def _next(self, length: int) -> torch.Tensor:
        self._turn = (self._turn + 1) % _NUM_BUFFERS
        copied = self._copied[self._turn]
        if copied is not None:
            copied.wait()
        if len(self._buffers[self._turn]) < length:
            self._buffers[self._turn] = self._allocate(2 * length)
        return self._buffers[self._turn]

    def _send(self, numbers: torch.Tensor, target: torch.Tensor | None) -> torch.Tensor:
        if target is None:
            target = torch.empty(len(numbers), dtype=torch.int32, device=self._device)
        target[: len(numbers)].copy_(numbers, non_blocking=True)
        self._copied[self._turn] = Event(self._device)
        return target

    def _allocate(self, length: int) -> torch.Tensor:
        return torch.empty(length, dtype=torch.int32, pin_memory=self._device.type == "cuda")


class Fetch:
    """A small tensor on its way from the device to pinned memory."""

    def __init__(self, tensor: torch.Tensor):
        on_device = tensor.device.type == "cuda"
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_device)
        self._host.copy_(tensor, non_blocking=True)
        self._done = Event(tensor.device)

    def wait(self) -> torch.Tensor:
        self._done.wait()
        return self._host
