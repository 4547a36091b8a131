"""Subjects that take turns, so that what disturbs the machine disturbs all of them; and the rows that come out.

- `seconds`: median of the calls after the first (of the first alone if the budget allows no more), with quartiles;
- `peak_mib`: highest memory during the first call minus the memory before it, with weights and input there and small
  calls done; the result counts, `output_mib` says how large it is. Resident memory on CPU, without what the C
  library keeps (see `clock.keep_freed_memory`); allocated memory on CUDA;
- `giga_multiply_adds`: of the network as it is written, whatever the variant makes of it;
- `floor_seconds`, `time_over_floor`: the same network's matrix products alone, each in the fastest layout found
  (`work.MatrixFloor`), timed directly after each call; medians of the times and of the ratios of neighbours. Only of a
  LeanVAE, whose work is nearly all matrix products.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from ..clock import keep_freed_memory
from .subjects import Subject


SUBJECT_KEYS = ("model", "variant", "dtype", "num_threads")
KEYS = (*SUBJECT_KEYS, "video", "direction")  # that tell one record from another
Record = dict[str, Any]


class MeasurementError(Exception):
    """A subject cannot be measured at a size; the reason becomes the row's `note`."""


def groups_of(records: Iterable[Record]) -> list[list[Record]]:
    """Group the records that take turns: all subjects at one size, dtype and number of threads."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault((*record["video"], record["dtype"], record["num_threads"]), []).append(record)
    return list(groups.values())


def run_here(
    records: Sequence[Record],
    make_subject: Callable[[Record], Subject],
    num_repeats: int,
    budget: float,
    save: Callable[[Record], None],
) -> None:
    """Run the rounds of each group in this process, memory before times; subjects are made when needed, and kept.

    Whatever a subject refuses, or has no memory for, becomes the `note` of its row: it costs no other row.
    """
    subjects: dict[tuple[Any, ...], Subject] = {}

    def measure(record: Record, is_first: bool) -> dict[str, Any]:
        torch.set_num_threads(record["num_threads"])
        key = tuple(record[name] for name in SUBJECT_KEYS)
        try:
            if key not in subjects:
                subjects[key] = make_subject(record)
            return subjects[key].measure(record["direction"], tuple(record["video"]), is_first)
        except ValueError as error:  # a sentence for whoever asked
            raise MeasurementError(" ".join(str(error).split())[:200]) from error
        except (RuntimeError, MemoryError) as error:
            raise MeasurementError(f"{type(error).__name__}: {error}".split("\n")[0][:200]) from error

    keep_freed_memory(False)
    for group in groups_of(records):
        run_rounds(group, measure, 0, budget, save)
    keep_freed_memory(True)
    for group in groups_of(records):
        run_rounds(group, measure, num_repeats, budget, save)


def describe(record: Record) -> str:
    """Describe the latest call in one line."""
    text = f"{record['model']:<26} {record['variant']:<8} {record['dtype']:<8} {record['num_threads']} threads  "
    text += f"{'x'.join(map(str, record['video'])):<12} {record['direction']}  "
    if "note" in record:
        return text + record["note"]
    if not record["seconds"]:
        first = record["first"]
        return text + f"{first['seconds']:9.4f} s at first, peak {first['peak_mib']} MiB"
    floor = record.get("floor_seconds")
    return text + f"{record['seconds'][-1]:9.4f} s" + (f", floor {floor[-1]:.4f} s" if floor else "")


def run_rounds(
    records: Sequence[Record],
    measure: Callable[[Record, bool], dict[str, Any]],
    num_repeats: int,
    budget: float,
    save: Callable[[Record], None],
) -> None:
    """Measure every record once for memory, then in turns until each has `num_repeats` times.

    Args:
        records: What to measure (keys are the caller's); results are added under `first`, `seconds`, `floor_seconds`
            and `note`. Records that hold some already continue from there.
        measure: One call of `Subject.measure` for a record and whether it is its first; raises `MeasurementError`.
        num_repeats: Calls after the first.
        budget: Seconds for each record: no call is begun that would probably outrun it.
        save: Called with each record that changed.
    """
    for number in range(num_repeats + 1):
        start = number % max(len(records), 1)  # not always after the same neighbour
        for record in [*records[start:], *records[:start]]:
            times = record.setdefault("seconds", [])
            if "note" in record or (number > 0 and len(times) >= number):
                continue
            if number == 0 and "first" in record:
                continue
            if number > 0:
                spent = record["first"]["seconds"] + sum(times) + sum(record.get("floor_seconds", []))
                if spent * (1 + 1 / (len(times) + 1)) > budget:
                    continue
            try:
                sample = measure(record, number == 0)
            except MeasurementError as error:
                record["note"] = str(error)
                save(record)
                continue
            if number == 0:
                record["first"] = sample
            else:
                times.append(sample["seconds"])
                if "floor_seconds" in sample:
                    record.setdefault("floor_seconds", []).append(sample["floor_seconds"])
            save(record)


def summarize(record: Record) -> dict[str, Any]:
    """Turn a record into a flat row: its figures, and its note if a call failed."""
    row = {key: record[key] for key in KEYS}
    if "first" in record:
        first = record["first"]
        times = record.get("seconds") or [first["seconds"]]
        lower, median, upper = _quartiles(times)
        row |= {"seconds": _rounded(median), "seconds_lower": _rounded(lower), "seconds_upper": _rounded(upper)}
        row |= {"repeats": len(times)} | {key: value for key, value in first.items() if key != "seconds"}
        row["giga_multiply_adds_per_second"] = _rounded(first["giga_multiply_adds"] / median)
        if floor := record.get("floor_seconds"):
            row["floor_seconds"] = _rounded(statistics.median(floor))
            ratios = [time / least for time, least in zip(record["seconds"], floor, strict=False)]
            row["time_over_floor"] = round(statistics.median(ratios), 3)
    if "note" in record:
        row["note"] = record["note"]
    return row


def _quartiles(values: Sequence[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
