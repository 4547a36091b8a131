"""Time and peak memory of one call."""

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch


MIB = 2**20
_Result = TypeVar("_Result")


def timed(work: Callable[[], _Result], device: torch.device) -> tuple[_Result, float]:
    """Return the result of one call and its seconds, the GPU's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - started


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Time one call, the GPU's work included."""
    return timed(work, device)[1]


def status_bytes(key: str) -> int:
    """Return a figure of `/proc/self/status`, such as `VmRSS`, in bytes."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def start_of_peak(device: torch.device) -> int | None:
    """Forget the old peak; returns the bytes in use now, or `None` where the system does not tell them."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return status_bytes("VmRSS")
    except (OSError, AttributeError, TypeError):
        return None


def end_of_peak(before: int | None, device: torch.device) -> int | None:
    """Return the bytes of the highest peak since `start_of_peak`, above what was in use then."""
    if before is None:
        return None
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() - before
    return status_bytes("VmHWM") - before


def keep_freed_memory(is_kept: bool) -> None:
    """Choose whether the C library keeps freed blocks (on Linux; no effect elsewhere).

    Kept memory makes allocation fast, but no network needs it. So peaks are measured in a process that has kept none
    from its start, and times with the thresholds that glibc reaches by itself once large blocks have been freed.
    """
    num_bytes = 2**25 if is_kept else 2**18
    m_trim_threshold, m_mmap_threshold = -1, -3  # of <malloc.h>
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_threshold, num_bytes)
        libc.mallopt(m_trim_threshold, 2 * num_bytes)
    except (AttributeError, TypeError):
        return
