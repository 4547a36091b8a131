"""The processes of a job, as `torchrun` and `accelerate launch` start them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist


if TYPE_CHECKING:  # an optional package
    from accelerate import Accelerator

# Where torchrun, and MPI by its several makers, say how many processes there are.
_WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def start_accelerator(**options: Any) -> Accelerator:
    """Start Accelerate in every process of a job, on the processor where there is no GPU for them.

    By itself Accelerate connects processes without a GPU only if it is told that they are to do without: `torchrun`
    would run as many jobs, each as its own first process, in one folder. And it would not shard models there, where
    the environment asks for FSDP, but say nothing.

    Args:
        options: Of `Accelerator`.

    Raises:
        ImportError: If accelerate is not installed.
        RuntimeError: If there are more processes than Accelerate has connected.
    """
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
    from accelerate.utils import DistributedType

    asked = num_processes_asked_for()
    # `accelerate launch` says so much where it was asked for several processes, and starts one: without GPUs it leaves
    # them to MPI.
    names = os.environ.keys()
    is_alone = "MASTER_ADDR" in names and "ACCELERATE_MIXED_PRECISION" in names and names.isdisjoint(_WORLD_SIZES)
    found = torch.accelerator.current_accelerator(check_available=True)
    if asked > 1 and (found is None or found.type == "mps"):  # of which no machine has two
        options["cpu"] = True
    accelerator = Accelerator(**options)
    if accelerator.num_processes < asked:
        raise RuntimeError(
            f"Accelerate must connect the {asked} processes of this job, got {accelerator.num_processes}: it has no "
            f"way to do so for {found}."
        )
    if accelerator.distributed_type == DistributedType.MULTI_CPU and is_asked_for("ACCELERATE_USE_FSDP"):
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP  # of all instances
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if is_alone and accelerator.num_processes == 1:
        warnings.warn(
            "This is a job of one process: without GPUs `accelerate launch` starts one, however many it is asked for; "
            "`torchrun --nproc_per_node N` starts N.",
            stacklevel=2,
        )
    return accelerator


def num_processes_asked_for() -> int:
    """Return the number of processes that the launcher has started, as the environment says; 1 without a launcher."""
    return max(int(os.environ.get(name) or 1) for name in _WORLD_SIZES)


def is_first_process() -> bool:
    """Tell whether this process is the first of its job, or has no job."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


@contextmanager
def leaving_job() -> Iterator[None]:
    """Disconnect this process from the others of its job in the end, whatever ends it."""
    try:
        yield
    finally:
        leave_job()


def leave_job() -> None:
    """Disconnect this process from the others of its job, if it is part of one; call it when the models are gone.

    A `DistributedDataParallel` that goes after the process group takes it along, and waits for its threads while it
    holds the lock of the interpreter, which they may need: https://github.com/pytorch/pytorch/issues/56297.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def is_asked_for(flag: str) -> bool:
    """Return whether the launcher has set a flag in the environment, read as Accelerate reads it."""
    return os.environ.get(flag, "false").lower() == "true"
