"""Several processes that share one run, started by `accelerate launch` or `torchrun`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

_LONGEST_WAIT = timedelta(days=7)


@dataclass(frozen=True)
class Processes:
    """This process among all processes of a run.

    Attributes:
        rank: number of this process, from 0.
        count: number of processes.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def join(cls, *, cpu: bool = False) -> Processes:
        """Find the other processes; call it before a model is loaded, so that each takes its own device.

        Args:
            cpu: whether the model runs on the CPU even if there is a GPU.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
            return cls()
        import torch
        from accelerate import PartialState

        # Without a GPU, accelerate treats every process as the only one unless it is told to use the CPU.
        state = PartialState(cpu=cpu or not torch.cuda.is_available(), timeout=_LONGEST_WAIT)
        return cls(state.process_index, state.num_processes)

    @property
    def is_first(self) -> bool:
        """Whether this process writes the common result."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any] | None:
        """The values of all processes by rank, in the first process; None in the others."""
        if self.count == 1:
            return [value]
        import torch

        gathered: list[Any] | None = [None] * self.count if self.is_first else None
        torch.distributed.gather_object(value, gathered, dst=0)
        return gathered

    def agree(self, value: Any) -> Any:
        """The first process's value, in every process."""
        if self.count == 1:
            return value
        import torch

        shared = [value]
        torch.distributed.broadcast_object_list(shared, src=0)
        return shared[0]

    def wait(self) -> None:
        """Wait until every process has reached this point."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()


ALONE = Processes()
"""A single process."""


__all__ = ["ALONE", "Processes"]
