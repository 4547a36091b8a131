"""LeanVAE next to diffusers' other video autoencoders: time, memory, work, and time over the matrix-product floor.

    python benchmarks/inference.py --threads 2                    everything; hours, because peers take minutes a call
    python benchmarks/inference.py --threads 2 --models LeanVAE-16ch --variants eager fused     LeanVAE alone
    python benchmarks/plots.py                                    docs/images/bench_*.png from the result

Every subject (model, variant, dtype, threads) lives in a process of its own with random weights; subjects take turns,
one call each (`diffusers_leanvae/benchmark/rounds.py` says what is measured and how). All measurements go to `--state`
at once: a run that was killed, or that is started again with more models or sizes, measures only what is missing. A
subject that needs more memory than the machine has left is tried again with all others unloaded; if that is not
enough either, or a call takes longer than `--max-call-seconds`, its row says so and the run continues.

The last line on standard output is the result as JSON, which also stands in `--output`.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from diffusers_leanvae.atomic import replace_file
from diffusers_leanvae.benchmark.linearity import linearity
from diffusers_leanvae.benchmark.names import LEANVAE, PEERS, VARIANTS
from diffusers_leanvae.benchmark.rounds import (
    KEYS,
    SUBJECT_KEYS,
    MeasurementError,
    Record,
    describe,
    groups_of,
    run_rounds,
    summarize,
)
from diffusers_leanvae.benchmark.subjects import Subject, build_model
from diffusers_leanvae.benchmark.work import DIRECTIONS
from diffusers_leanvae.checks import DTYPES, parse_dtype, parse_video_size
from diffusers_leanvae.clock import MIB, keep_freed_memory, status_bytes
from diffusers_leanvae.evaluation.results import provenance, write_result


MODELS = ("LeanVAE-16ch", "LeanVAE-4ch", *PEERS)
LEANVAE_VARIANTS = ["eager", "fused", "compiled"]
SIZES = ["17x256x256", "17x512x512"]
# For the curves: area at 17 frames, length at 256x256. Only LeanVAE-16ch and the peers are drawn.
SCALING = ["17x128x128", "17x192x192", "17x384x384", "5x256x256", "9x256x256", "33x256x256", "65x256x256"]
PEER_SCALING = ["17x128x128", "9x256x256"]


# ---- a subject in a process of its own ------------------------------------------------------------------------------


def serve(connection: Connection, for_memory: bool, model: str, variant: str, dtype: str, num_threads: int) -> None:
    """Builds the subject, then answers each `(direction, size, is_first, limit)` with a dictionary."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    limit_memory(connection.recv())
    keep_freed_memory(not for_memory)
    torch.set_num_threads(num_threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    subject = None
    while True:
        try:
            if subject is None:
                subject = Subject(build_model(model, device, parse_dtype("dtype", dtype)), variant)
                connection.send({})
            direction, size, is_first, limit = connection.recv()
            limit_memory(limit)
            connection.send(subject.measure(direction, size, is_first))
        except (EOFError, BrokenPipeError):  # nobody asks any more
            return
        except Exception as error:  # whatever a peer throws at a size is a finding, and ends this process only
            text = f"{type(error).__name__}: {error}".split("\n")[0][:200]
            signs = ("allocate memory", "out of memory", "bad_alloc", "MemoryError")
            # oneDNN says no more than this when its scratch memory is refused.
            signs += ("could not create a memory", "could not create a primitive", "could not execute a primitive")
            connection.send({"error": text, "is_memory": any(sign in text for sign in signs)})
            return


def limit_memory(num_bytes: int | None) -> None:
    """Let this process take `num_bytes` more, and be the first that the kernel kills if that was too much."""
    if num_bytes is None or not sys.platform.startswith("linux"):
        return
    import resource

    used = status_bytes("VmData")
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + num_bytes, hard))
    Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


class OutOfMemory(MeasurementError):
    """The memory that the machine has left was not enough."""


class Worker:
    """The other end of `serve`."""

    def __init__(self, settings: tuple[Any, ...], reserve: int, max_seconds: float):
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, *settings), daemon=True)
        self.process.start()
        self.is_alive = True
        other.close()
        self.reserve, self.max_seconds = reserve, max_seconds
        self._ask(self._limit())

    def measure(self, direction: str, size: tuple[int, ...], is_first: bool) -> dict[str, Any]:
        return self._ask((direction, size, is_first, self._limit()))

    def _limit(self) -> int | None:
        # On a GPU its own memory is the limit, and CUDA reserves more address space than any limit would grant.
        return None if torch.cuda.is_available() else available_memory(self.reserve)

    def _ask(self, request: Any) -> dict[str, Any]:
        left = available_memory(self.reserve)
        try:
            self.connection.send(request)
            if not self.connection.poll(self.max_seconds):
                self.stop()
                raise MeasurementError(f"stopped after {self.max_seconds:,.0f} s")
            answer = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            self.is_alive, code = False, self.process.exitcode
            if code in (-signal.SIGKILL, -signal.SIGABRT, -signal.SIGSEGV):  # a library that cannot take a refusal
                raise OutOfMemory(f"needs more than the {left / 2**30:.1f} GiB that were free") from None
            raise MeasurementError(f"process ended with status {code}") from None
        if "error" in answer:
            self.stop()
            if answer["is_memory"]:
                raise OutOfMemory(f"needs more than the {left / 2**30:.1f} GiB that were free")
            raise MeasurementError(answer["error"])
        return answer

    def stop(self) -> None:
        if self.is_alive:
            self.process.kill()
            self.process.join()
        self.is_alive = False


def available_memory(reserve: int) -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        available = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    return max(available - reserve, 64 * MIB)


class Pool:
    """All workers, started when first needed and again after they ended.

    Memory is measured in workers that measure nothing else, one at a time; those for times stay, for all sizes.
    """

    def __init__(self, reserve: int, max_seconds: float):
        self.workers: dict[tuple[Any, ...], Worker] = {}
        self.reserve, self.max_seconds = reserve, max_seconds

    def measure(self, record: Record, is_first: bool) -> dict[str, Any]:
        settings = (is_first, *(record[key] for key in SUBJECT_KEYS))
        for attempt in range(2):
            for other in [key for key in self.workers if key[0] and key != settings]:
                self.workers.pop(other).stop()
            try:
                worker = self.workers.get(settings)
                if worker is None or not worker.is_alive:
                    worker = self.workers[settings] = Worker(settings, self.reserve, self.max_seconds)
                return worker.measure(record["direction"], tuple(record["video"]), is_first)
            except OutOfMemory:
                was_alone = not self.workers.keys() - {settings}
                self.stop()
                if attempt or was_alone:
                    raise
                # Once more with the machine to itself.
        raise AssertionError

    def stop(self) -> None:
        while self.workers:
            self.workers.popitem()[1].stop()


# ---- the plan, and what is done of it -------------------------------------------------------------------------------


def make_plan(options: argparse.Namespace) -> list[Record]:
    """Records without results, in the order in which they are measured: sizes of the table first."""
    plan: dict[str, Record] = {}
    given = {"--sizes": options.sizes, "--scaling": options.scaling, "--peer-scaling": options.peer_scaling}
    for group, (option, sizes) in enumerate(given.items()):
        for model in options.models:
            is_peer = model in PEERS
            if (group == 1 and model != "LeanVAE-16ch") or (group == 2 and not is_peer):
                continue
            variants = options.scaling_variants if group == 1 else options.variants
            for size in (parse_video_size(option, text) for text in sizes):
                for dtype in options.peer_dtypes if is_peer else options.dtypes:
                    for num_threads in options.threads:
                        for variant in ["eager"] if is_peer else variants:
                            for direction in DIRECTIONS:
                                values = (model, variant, dtype, num_threads, size, direction)
                                record: Record = dict(zip(KEYS, values, strict=True))
                                plan.setdefault(identity(record), record)
    return list(plan.values())


def identity(record: Record) -> str:
    return json.dumps([record[key] for key in KEYS])


class State:
    """Everything measured so far, on disk after each call."""

    def __init__(self, path: Path):
        self.path = path
        machine = {key: provenance()[key] for key in ("processor", "num_cores", "gpu")}
        self.content: dict[str, Any] = {"machine": machine, "records": {}}
        if path.exists():
            self.content = json.loads(path.read_text(encoding="utf-8"))
            if self.content["machine"] != machine:
                raise SystemExit(f"`--state` must be of this machine, got {path} of {self.content['machine']}.")

    def adopt(self, record: Record, retry: bool) -> Record:
        """The record as far as it is measured."""
        known = self.content["records"].get(identity(record), {})
        if retry and "note" in known:
            known = {}
        return record | known

    def save(self, record: Record) -> None:
        self.content["records"][identity(record)] = record
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(self.path) as partial:
            partial.write_text(json.dumps(self.content), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=(*LEANVAE, *PEERS))
    parser.add_argument("--variants", nargs="*", default=LEANVAE_VARIANTS, choices=list(VARIANTS))
    parser.add_argument("--sizes", nargs="*", default=SIZES, help="frames x height x width, for all models")
    parser.add_argument("--scaling", nargs="*", default=SCALING, help="more sizes for LeanVAE-16ch")
    parser.add_argument("--scaling-variants", nargs="*", default=["eager", "fused"], choices=list(VARIANTS))
    parser.add_argument("--peer-scaling", nargs="*", default=PEER_SCALING, help="more sizes for the peers")
    parser.add_argument("--dtypes", nargs="*", default=["float32"], choices=list(DTYPES), help="of LeanVAE")
    parser.add_argument("--peer-dtypes", nargs="*", default=["float32"], choices=list(DTYPES))
    parser.add_argument("--threads", nargs="*", type=int, default=[torch.get_num_threads()])
    parser.add_argument("--repeats", type=int, default=9, help="calls after the first")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds for a row; slow models repeat less")
    parser.add_argument("--max-call-seconds", type=float, default=3600.0)
    parser.add_argument("--reserve-gib", type=float, default=1.0, help="memory that stays free")
    parser.add_argument("--retry", action="store_true", help="measure again what had failed")
    parser.add_argument("--report", action="store_true", help="measure nothing, write what `--state` holds")
    parser.add_argument("--state", type=Path, default=Path("outputs/bench_inference_state.json"))
    parser.add_argument("--output", type=Path, default=Path("results/bench_inference.json"))
    options = parser.parse_args()
    # Compiling in the subject's own process: helpers would wait in memory, and be beyond its limit.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    torch.set_num_threads(max(options.threads))  # which the provenance tells
    started = time.monotonic()
    state = State(options.state)
    if options.report:
        plan = list(state.content["records"].values())
    else:
        plan = [state.adopt(record, options.retry) for record in make_plan(options)]
    pool = Pool(int(options.reserve_gib * 2**30), options.max_call_seconds)

    def save(record: Record) -> None:
        state.save(record)
        print(f"{time.monotonic() - started:7.0f} s  {describe(record)}", flush=True)

    try:
        for group in groups_of(plan):
            if not options.report:
                run_rounds(group, pool.measure, options.repeats, options.budget, save)
            rows = [summarize(record) for record in plan if "first" in record or "note" in record]
            result = {"weights": "random", "rows": rows, "linearity": linearity(rows)}
            write_result(options.output, result)
    finally:
        pool.stop()
    print(json.dumps(json.loads(options.output.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
