"""The process group: started so that a restarted worker finds its peers, ended so that a finished run exits with 0."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from data_pipeline.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Distributed:
    """This process among its peers. ``device`` is the local rank's GPU, or the CPU where there is none."""

    rank: int
    world_size: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    """Some of the run's ranks, among whom ``rank`` and ``world_size`` count; None: all of them."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place; every rank gets the same bits."""
        if self.world_size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """[n, ...] of every rank to [world_size * n, ...], in rank order."""
        if self.world_size == 1:
            return tensor
        gathered = tensor.new_empty((self.world_size * tensor.shape[0], *tensor.shape[1:]))
        dist.all_gather_single(gathered, tensor, group=self.group)
        return gathered

    def all_to_all(self, tensor: Tensor, leaving: list[int], arriving: list[int]) -> Tensor:
        """Rows of a tensor to each rank, in rank order, for rows from each.

        Args:
            tensor: [sum(leaving), ...], contiguous.
            leaving: rows for each rank.
            arriving: rows from each rank.

        Returns:
            [sum(arriving), ...], in rank order.
        """
        if self.world_size == 1:
            return tensor
        received = tensor.new_empty((sum(arriving), *tensor.shape[1:]))
        dist.all_to_all_single(received, tensor, arriving, leaving, group=self.group)
        return received

    def gather_objects(self, item: T) -> list[T]:
        """Every rank's picklable item, in rank order, on every rank."""
        if self.world_size == 1:
            return [item]
        items: list[T | None] = [None] * self.world_size
        dist.all_gather_object(items, item, group=self.group)
        return items  # type: ignore[return-value]  # all_gather_object has filled every place

    def broadcast_object(self, item: T) -> T:
        """Rank 0's picklable item, on every rank."""
        if self.world_size == 1:
            return item
        items = [item]
        dist.broadcast_object_list(items, group=self.group, group_src=0)
        return items[0]

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """The values of rank ``source``, in place; the tensor may lie on another device than the rank's."""
        if self.world_size > 1:
            carried = tensor.to(self.device)
            dist.broadcast(carried, group=self.group, group_src=source)
            tensor.copy_(carried)
        return tensor

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier(self.group)


def start(timeout_seconds: int) -> Distributed:
    """Join the process group that torchrun's environment describes; without one, be a group of one.

    Raises:
        UserError: the environment names more local ranks than there are GPUs.
    """
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank} has no GPU: this host shows {torch.cuda.device_count()}. "
                "Start at most one process for each GPU (torchrun --nproc-per-node)."
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    timeout = timedelta(seconds=timeout_seconds)
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    # torchrun's store outlives a restarted worker; without a prefix of its own the new gloo mesh would read the dead
    # workers' addresses out of it and fail to connect
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore(f"headrace/attempt_{attempt}", store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    return Distributed(rank, world_size, device)


def set_timeout_of_all_groups(seconds: int) -> None:
    """Give every process group the same timeout: those that a library made kept torch's 30 minutes."""
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def finish(exit_code: int, together: bool) -> NoReturn:
    """End the process without running the interpreter's finalizers.

    gloo's threads may still release Python objects while the interpreter shuts down, which ends a successful run with
    SIGABRT now and then; leaving directly after a barrier avoids it.

    Args:
        exit_code: of the process.
        together: all ranks end here (not so after an error of one of them), so they can wait for each other.
    """
    if together and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
