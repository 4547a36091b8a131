"""The work of encoding a data set, done by the processes of Ray Data: readers decode clips, encoders encode them.

Readers and encoders are actors, on one machine or on a cluster; only the process that started them writes. What an
actor that is killed had in hand is done again by another one. How clips are read and encoded is given to it.
"""

import itertools
import os
import pickle
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn


def encode_with_ray(
    numbers: Sequence[int],
    open_reader: Callable[[], Callable[[int], Iterator[Any]]],
    model: nn.Module,
    encode: Callable[[Any, Any], Any],
    num_readers: int | None = None,
    num_encoders: int | None = None,
) -> Generator[tuple[int, list[Any]], None, None]:
    """Read and encode shards, each of them a number of batches.

    Connects to the cluster of `RAY_ADDRESS`, to one that runs on this machine, or else starts one here for the time
    of the work. This package must be installed on all machines of a cluster.

    Args:
        numbers: Numbers of the shards.
        open_reader: Called once in every reader; gives the function that yields the batches of a shard.
        model: Sent to every encoder, and moved there to its GPU.
        encode: Encodes a batch with the model; the result must be on the CPU.
        num_readers: Processes that read, at most; by default as many as there are processors.
        num_encoders: Processes that encode; by default one per GPU, or one per two processors where there is no GPU.

    Yields:
        The number of a shard and its encoded batches in order, whenever a shard is done.

    Raises:
        ValueError: Such an error of a reader, or of `encode`.
        ImportError: If Ray is not installed.
    """
    ray, pyarrow = _import_ray()
    if not numbers:
        return
    is_ours = not ray.is_initialized()
    if is_ours:
        ray.init(logging_level="WARNING")
    try:
        found = ray.cluster_resources()
        num_gpus, num_cpus = int(found.get("GPU", 0)), int(found.get("CPU", 1))
        place = {"num_gpus": 1} if num_gpus else {"num_gpus": 0}
        sent = ray.put(model.to("cpu"))
        shards = ray.data.from_arrow([pyarrow.table({"shard": [number]}) for number in numbers])
        shards.context.enable_progress_bars = False
        batches = shards.map_batches(
            _Reader,
            fn_constructor_args=(ray.put(open_reader), os.getcwd()),  # which may hold a long list
            batch_format="pyarrow",
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=num_readers or num_cpus),
            num_cpus=1,
        )
        encoded = batches.map_batches(
            _Encoder,
            fn_constructor_args=(sent, encode),
            batch_format="pyarrow",
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(size=num_encoders or num_gpus or max(1, num_cpus // 2)),
            # Readers take all processors: with one of them to itself, an encoder might wait for it for ever. As many
            # threads as here, since the order of sums depends on their number.
            num_cpus=0,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(torch.get_num_threads())}},
            **place,
        )
        yield from _collect(encoded.iter_rows())
    finally:
        if is_ours:
            ray.shutdown()


def _import_ray() -> tuple[Any, Any]:
    """Import Ray, its data sets, and the tables that these are made of."""
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import ray  # pyright: ignore[reportMissingImports]
        import ray.data  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError('`engine` "ray" needs Ray: pip install "diffusers-leanvae[ray]".') from error
    return ray, pyarrow


class _Reader:
    """Gives the batches of shards: a row for each, and a last one without content."""

    def __init__(self, sent: Any, folder: str) -> None:
        if os.path.isdir(folder):  # which relative names of files start from
            os.chdir(folder)
        ray, _ = _import_ray()
        self.read: Callable[[int], Iterator[Any]] = ray.get(sent)()

    def __call__(self, table: Any) -> Iterator[Any]:
        for shard in table["shard"].to_pylist():
            counter = itertools.count()
            try:
                for batch in self.read(shard):
                    yield _to_table([(shard, next(counter), pickle.dumps(batch))])
                yield _to_table([(shard, next(counter), b"")])
            except ValueError as error:  # as content, since Ray keeps no more of an error than its text
                yield _to_table([(shard, next(counter), pickle.dumps(error))])


class _Encoder:
    """Encodes batches, each as it came: rounding can depend on what is encoded together."""

    def __init__(self, sent: Any, encode: Callable[[Any, Any], Any]) -> None:
        ray, _ = _import_ray()
        model = ray.get(sent)
        self.model, self.encode = model.to("cuda" if ray.get_gpu_ids() else "cpu"), encode

    def __call__(self, table: Any) -> Any:
        return _to_table(
            [
                (row["shard"], row["batch"], row["content"] and self._encode(row["content"]))
                for row in table.to_pylist()
            ]
        )

    def _encode(self, content: bytes) -> bytes:
        batch = pickle.loads(content)
        if isinstance(batch, ValueError):
            return content
        try:
            return pickle.dumps(self.encode(self.model, batch))
        except ValueError as error:
            return pickle.dumps(error)


def _to_table(rows: list[tuple[int, int, bytes]]) -> Any:
    _, pyarrow = _import_ray()
    shards, batches, contents = zip(*rows, strict=True)
    large = pyarrow.array(contents, pyarrow.large_binary())  # others end at 2 GiB
    return pyarrow.table({"shard": shards, "batch": batches, "content": large})


def _collect(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[int, list[Any]]]:
    """Put batches, which come in any order, together to shards."""
    shards: dict[int, dict[int, Any]] = {}
    for row in rows:
        batches = shards.setdefault(row["shard"], {})
        batches[row["batch"]] = batch = pickle.loads(row["content"]) if row["content"] else None
        if isinstance(batch, ValueError):
            raise batch
        last = max(batches)
        if batches[last] is None and len(batches) == last + 1:
            del shards[row["shard"]]
            yield row["shard"], [batches[number] for number in range(last)]
