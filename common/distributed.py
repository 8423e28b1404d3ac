"""Several processes, started by torchrun, that train one network together; one process alone changes nothing here.

    torchrun --nproc-per-node=2 train.py --run_id=r

Each process trains on its share of every batch and scores its share of every split. PyTorch's
DistributedDataParallel averages the gradients, the scores are gathered, and only the first process writes records.
"""

import atexit
import os
import sys
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from common.config import n_processes, torchrun_number
from common.errors import UsageError, first_line


def join(cuda: bool) -> None:
    """Join the other processes, if torchrun has started any; only the first one prints."""
    if n_processes() < 2 or dist.is_initialized():
        return
    if cuda:
        if torch.cuda.device_count() <= local_rank():
            raise UsageError(
                f"torchrun: process {local_rank() + 1} of this machine has no GPU; --nproc-per-node="
                f"{torch.cuda.device_count()} uses each once"
            )
        torch.cuda.set_device(local_rank())
    try:
        dist.init_process_group("nccl" if cuda else "gloo")
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"WORLD_SIZE={n_processes()}: the processes cannot find each other ({first_line(error)}); start them "
            "with torchrun, or unset WORLD_SIZE"
        ) from error
    atexit.register(dist.destroy_process_group)
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)


@cache
def _cpus() -> Any:
    """The group in which the processes' CPUs exchange values."""
    return dist.new_group(backend="gloo")


def local_rank() -> int:
    """The number of this process on its machine, which is its GPU's."""
    return torchrun_number("LOCAL_RANK", 0)


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among all."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this process writes the records."""
    return rank() == 0


def parallel(model: nn.Module, changing: bool) -> nn.Module:
    """The network, with gradients averaged over all processes; `changing`: parts may be frozen for a while."""
    if world_size() == 1:
        return model
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=changing)


def synchronised(model: nn.Module, device: torch.device) -> nn.Module:
    """The network with BatchNorm over the whole batch, which PyTorch has for GPUs only.

    On CPUs each process normalises its share of the batch by that share's statistics.
    """
    if world_size() == 1 or device.type != "cuda":
        return model
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    return converted


def share(indices: torch.Tensor) -> torch.Tensor:
    """The consecutive indices of a batch that this process takes; the shares' sizes differ by one at most."""
    return indices.tensor_split(world_size())[rank()]


def weighted(loss: torch.Tensor, share: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    """The mean loss of a share, scaled so that its mean over all processes is the mean over the whole batch."""
    weight = len(share) * world_size() / len(batch)
    return loss * weight if weight != 1 else loss


def total(value: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def gathered(rows: torch.Tensor, n: int) -> torch.Tensor:
    """The rows (n, …) of all processes, where each process has the rows of its `share`."""
    if world_size() == 1:
        return rows
    sizes = [len(part) for part in torch.arange(n).tensor_split(world_size())]
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def any_of_all(flag: bool) -> bool:
    """Whether the flag is set in any process; the processes' CPUs agree on it, and no GPU waits."""
    if world_size() == 1:
        return flag
    flags = torch.tensor(int(flag))
    dist.all_reduce(flags, group=_cpus())
    return bool(flags)


def of_all(value: Any) -> list[Any]:
    """Every process's value, in the order of their ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_cpus())
    return values


def same_buffers(model: nn.Module) -> None:
    """Copy the first process's buffers to all: each process's BatchNorm statistics come from its tiles alone."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
