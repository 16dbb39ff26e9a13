"""The processes of one training run: which this is, and what they share."""

from __future__ import annotations

import os
import re
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dsgnn.runtime.errors import OptionError

T = TypeVar("T")


def choose_device(device: str) -> torch.device:
    """device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".

    Raises OptionError for anything else, and for a GPU that PyTorch does not see: it never falls
    back to the CPU.
    """
    count = torch.cuda.device_count()
    if device == "auto":
        device = "cuda" if count else "cpu"
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", device)
    if match is None:
        raise OptionError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}", "device")
    if device != "cpu" and int(match[1] or 0) >= count:
        raise OptionError(
            f"device {device} was asked for, but PyTorch {torch.__version__} sees {count} GPUs: "
            "install an NVIDIA driver and a CUDA build of PyTorch, or use the device cpu",
            "device",
        )
    return torch.device(device)


def join(device: str) -> torch.device:
    """Join the group that torchrun made, if any (nccl on GPUs, gloo on CPUs).

    device: as for `choose_device`. → the device of this process; in a group each process of a
    machine has its own GPU. Raises OptionError as there, for "cuda:N" in a group, and when a
    machine has more processes than GPUs.
    """
    where = choose_device(device)
    grouped = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if where.type == "cuda":
        if grouped and where.index is not None:
            raise OptionError(
                f"torchrun gives each process its own GPU: use the device cuda, got {device}",
                "device",
            )
        index = int(os.environ["LOCAL_RANK"]) if grouped else where.index or 0
        if index >= (count := torch.cuda.device_count()):
            raise OptionError(
                f"process {index} of this machine has no GPU of its own ({count} seen): let "
                f"torchrun start {count} processes"
            )
        where = torch.device("cuda", index)
        torch.cuda.set_device(where)
    if grouped:
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    return where


def leave() -> None:
    """Leave the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def process() -> tuple[int, int]:
    """Rank of this process and number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def mean(value: Tensor) -> Tensor:
    """Mean over the processes."""
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def gather(value: T) -> list[T]:
    """What each process has, by rank."""
    values = [value] * process()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def share_buffers(module: torch.nn.Module) -> None:
    """Give every process the first one's buffers (BatchNorm statistics are each process's own)."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)
