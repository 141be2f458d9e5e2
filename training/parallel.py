"""Data parallelism: `torchrun --standalone --nproc-per-node N -m training.train --out DIR`.

Each rank learns from batches of its own; their gradients are averaged, so that all ranks have the same
weights at every step. A step then sees N times the tokens.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters


@dataclass(frozen=True)
class Ranks:
    """This process's number among those that train together; one alone by default."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """True for the one rank that saves, evaluates and exports."""
        return self.rank == 0

    def numbered(self, step: int) -> int:
        """The number of this rank's batch of a step, which no other rank and step has."""
        return step * self.size + self.rank

    def wait(self) -> None:
        """Returns once every rank has come here."""
        if self.size > 1:
            dist.barrier()

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replaces each gradient by its mean over the ranks, which all call this after the same step."""
        if self.size == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        together = parameters_to_vector(gradients)
        dist.all_reduce(together)
        vector_to_parameters(together / self.size, gradients)


def join() -> tuple[Ranks, torch.device]:
    """This process's rank among those that torchrun began, and its device; one alone outside of torchrun."""
    on_gpu = torch.cuda.is_available()
    if "WORLD_SIZE" not in os.environ:
        return Ranks(), torch.device("cuda" if on_gpu else "cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    return Ranks(dist.get_rank(), dist.get_world_size()), device


def leave() -> None:
    """Ends what `join` began."""
    if dist.is_initialized():
        dist.destroy_process_group()
