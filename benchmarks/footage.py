"""Time to read and write 1080p: video of 8 and 10 bits, and pictures, next to another checkout of this package.

    python benchmarks/footage.py                                    this checkout alone
    python benchmarks/footage.py --before ../older-checkout         both, taking turns
    python benchmarks/footage.py --before ../older-checkout --cases "read h264 8 bits" --repeats 9

Each checkout works in a process of its own; they take turns, call by call, the first one in every second round last.
`cpu_ms` is processor time per frame, of all threads, which others on the machine disturb less than the clock;
`frames_per_second` is by the clock. Both are medians, the ratios (after over before) medians over the rounds. Pictures
are read and written as a sequence, or one by one where a checkout knows no sequences.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np


ROOT = Path(__file__).resolve().parents[1]
WIDTH, HEIGHT = 1920, 1080
# Name, frames, file or pattern, settings of the file that is read or of the writer.
READ = {
    "read h264 8 bits": (60, "h264.mp4", ("libx264", "yuv420p")),
    "read h264 8 bits, variable rate": (60, "variable.mp4", ("libx264", "yuv420p")),
    "read hevc 10 bits": (60, "hevc.mp4", ("libx265", "yuv420p10le")),
    "read prores 10 bits 4:2:2": (24, "prores.mov", ("prores_ks", "yuv422p10le")),
    "read png sequence": (16, "png/%04d.png", ("png", "rgb24")),
    "read jpeg sequence": (48, "jpeg/%04d.jpg", ("mjpeg", "yuvj420p")),
}
WRITE: dict[str, tuple[int, str, dict[str, Any]]] = {
    "write h264": (24, "out.mp4", {}),
    "write h264, ultrafast": (48, "out.mp4", {"preset": "ultrafast"}),
    "write ffv1": (12, "out.mkv", {"codec": "ffv1"}),
    "write png sequence": (12, "out/%04d.png", {}),
}


@functools.cache
def layers() -> tuple[np.ndarray, list[np.ndarray]]:
    """Edges and ramps, and four kinds of grain."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    base = np.stack([x // 8 % 200, (y // 5 + x // 40) % 200, (x // 120 + y // 90) % 2 * 160 + 40], -1)
    rng = np.random.default_rng(0)
    return base.astype(np.uint8), [rng.integers(0, 5, (HEIGHT, WIDTH, 1), dtype=np.uint8) for _ in range(4)]


def picture(index: int) -> np.ndarray:
    """A picture with edges, ramps and grain, which moves by four pixels from frame to frame."""
    base, grains = layers()
    return np.roll(base, 4 * index, 1) + grains[index % 4]


def make_source(path: Path, num_frames: int, codec: str, pixel_format: str) -> None:
    """Write what is to be read, by PyAV alone."""
    import av

    path.parent.mkdir(exist_ok=True)
    format = "image2" if "%" in path.name else None
    with av.open(str(path), "w", format=format) as container:
        options = {"crf": "23", "preset": "fast", "x265-params": "log-level=none"} if codec.startswith("lib") else {}
        stream: Any = container.add_stream(codec, rate=Fraction(25), options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pixel_format
        for index in range(num_frames):
            frame = av.VideoFrame.from_ndarray(picture(index), format="rgb24").reformat(format=pixel_format)
            frame.pts = index + (index // 3 if "variable" in path.name else 0)
            frame.time_base = Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


# --- In the process of a checkout ------------------------------------------------------------------------------------


def read(path: Path, num_frames: int, has_sequences: bool) -> None:
    from diffusers_leanvae.video_io import VideoReader

    is_sequence = "%" in path.name
    sources = [path]
    if is_sequence and not has_sequences:
        sources = [path.with_name(path.name % number) for number in range(1, num_frames + 1)]
    count = 0
    for source in sources:
        with VideoReader(source) as video:
            count += sum(len(frames) for frames in video.frames())
    assert count == num_frames


def write(path: Path, frames: np.ndarray, options: dict[str, Any], has_sequences: bool) -> None:
    from diffusers_leanvae.video_io import VideoWriter

    if "%" in path.name and not has_sequences:
        for number, frame in enumerate(frames, start=1):
            with VideoWriter(path.with_name(path.name % number), 25) as writer:
                writer.write(frame[None])
        return
    with VideoWriter(path, 25, **options) as writer:
        for start in range(0, len(frames), 8):
            writer.write(frames[start : start + 8])


def work(folder: Path) -> None:
    """Do the case that each line of standard input names, and answer with its seconds."""
    from diffusers_leanvae import video_io

    has_sequences = hasattr(video_io.VideoReader, "timed_frames")
    (folder / "out").mkdir(exist_ok=True)
    for line in sys.stdin:
        name = line.strip()
        if name in READ:
            num_frames, file, _ = READ[name]
            call = timed(lambda file=file, count=num_frames: read(folder / file, count, has_sequences))
        else:
            num_frames, file, options = WRITE[name]
            frames = np.stack([picture(index) for index in range(num_frames)])
            call = timed(lambda f=frames, file=file, o=options: write(folder / file, f, o, has_sequences))
        print(json.dumps({"package": video_io.__file__, "num_frames": num_frames} | call), flush=True)


def timed(call: Callable[[], None]) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


# --- Taking turns ----------------------------------------------------------------------------------------------------


class Checkout:
    """A process that works with the package of a checkout."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.source = (root / "src").resolve()
        environment = os.environ | {"PYTHONPATH": str(self.source)}
        command = [sys.executable, __file__, "--work-in", str(folder)]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def call(self, case: str) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(case, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{case!r} failed with {self.source}")
        result = json.loads(answer)
        if not Path(result["package"]).is_relative_to(self.source):
            raise SystemExit(f"`--before` must be a checkout of this package, got {result['package']} instead of it.")
        return result

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(case: str, checkouts: dict[str, Checkout], num_repeats: int) -> dict[str, Any]:
    times: dict[str, list[dict[str, Any]]] = {name: [] for name in checkouts}
    for checkout in checkouts.values():
        checkout.call(case)  # code and files are in memory then
    for number in range(num_repeats):
        order = list(checkouts) if number % 2 == 0 else list(checkouts)[::-1]
        for name in order:
            times[name].append(checkouts[name].call(case))
    num_frames = times["after"][0]["num_frames"]
    row: dict[str, Any] = {"case": case, "num_frames": num_frames}
    for name, calls in times.items():
        row[f"cpu_ms_{name}"] = round(1000 * statistics.median(call["cpu"] for call in calls) / num_frames, 2)
        row[f"frames_per_second_{name}"] = round(num_frames / statistics.median(call["wall"] for call in calls), 1)
    if "before" in times:
        for key, label in (("cpu", "cpu_ratio"), ("wall", "wall_ratio")):
            pairs = zip(times["before"], times["after"], strict=True)
            row[label] = round(statistics.median(after[key] / before[key] for before, after in pairs), 3)
    return row | {"repeats": num_repeats}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="another checkout of this repository, to compare with")
    parser.add_argument("--cases", nargs="*", default=[*READ, *WRITE], choices=[*READ, *WRITE])
    parser.add_argument("--repeats", type=int, default=5, help="calls after the first")
    parser.add_argument("--output", type=Path, default=Path("results/bench_footage.json"))
    parser.add_argument("--work-in", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work_in is not None:
        work(options.work_in)
        return
    from diffusers_leanvae.evaluation.results import write_result

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case in options.cases:
            if case in READ:
                num_frames, file, (codec, pixel_format) = READ[case]
                make_source(folder / file, num_frames, codec, pixel_format)
        roots = ({"before": options.before} if options.before else {}) | {"after": ROOT}
        checkouts = {name: Checkout(root, folder) for name, root in roots.items()}
        rows = []
        try:
            for case in options.cases:
                rows.append(measure(case, checkouts, options.repeats))
                print(rows[-1], flush=True)
        finally:
            for checkout in checkouts.values():
                checkout.close()
    write_result(options.output, {"size": [WIDTH, HEIGHT], "rows": rows})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
