"""The growth of time and memory with the size of a video."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from .rounds import SUBJECT_KEYS


def linearity(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Measure how time and memory grow with the number of latent positions, over length and over area.

    For each model, variant, dtype, direction and quantity with at least three sizes that differ in length only, or in
    area only: `exponent` (slope of the logarithms, 1 if proportional), `r_squared` of the straight line through the
    points, and `max_deviation` from the line through the origin, as a share of it.
    """
    names = (*SUBJECT_KEYS, "direction")
    found = []
    for axis, same in (("length", lambda video: tuple(video[1:])), ("area", lambda video: video[0])):
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for row in rows:
            if "seconds" in row:
                groups.setdefault((*(row[name] for name in names), same(row["video"])), []).append(row)
        for (*key, _), members in groups.items():
            members.sort(key=lambda row: math.prod(row["video"]))
            for quantity in ("seconds", "peak_mib"):
                points = [(math.prod(row["latent"]), row[quantity]) for row in members if row.get(quantity)]
                if len({x for x, _ in points}) >= 3:
                    sizes = [row["video"] for row in members if row.get(quantity)]
                    about = dict(zip(names, key, strict=True)) | {"axis": axis, "quantity": quantity}
                    found.append(about | {"smallest": sizes[0], "largest": sizes[-1]} | _fit(points))
    return found


def _fit(points: Sequence[tuple[float, float]]) -> dict[str, Any]:
    xs, ys = zip(*points, strict=True)
    exponent, _ = statistics.linear_regression([math.log(x) for x in xs], [math.log(y) for y in ys])
    slope = statistics.linear_regression(xs, ys, proportional=True).slope
    return {
        "num_points": len(points),
        "exponent": round(exponent, 3),
        "r_squared": round(statistics.correlation(xs, ys) ** 2, 5),
        "max_deviation": round(max(abs(y / (slope * x) - 1) for x, y in points), 3),
    }
