"""Streamed training data, from a dataset that can only be read from front to back, through `datasets`.

The stream is cut into blocks, each of which becomes a folder on disk; within its block a clip is a pure function of
the seed and of its index. So any index can be asked for, and costs reading the stream up to its block, or from the
position that `state_dict` remembers.
"""

import json
import math
import os
import shutil
import tempfile
import threading
import warnings
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..video_io.inputs import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from .cutting import ClipOptions, VideoOrder, VideoSet
from .datasets import ClipDataset, make_image_order, wanted_sizes
from .schedule import ALONE, Share, StepBatches, StepSchedule
from .sources import FileSource, VideoSource, expand_braces, is_compressed_tar
from .storage import RemotePath, open_path


_NUM_BATCHES_AHEAD = 64  # a block stays on disk until this many batches were handed out after its last one


def is_stream(train: str) -> bool:
    """Tell streamed datasets, which are on the Hub or tar files at a URL, from those whose files can be listed."""
    is_tar = train.endswith(".tar") or is_compressed_tar(train)
    return train.startswith(("hub:", "hf://", "http://", "https://")) or ("://" in train and is_tar)


def open_stream(train: str) -> Any:
    """Open the `datasets.IterableDataset` that `train` names: tar files at a URL, or a dataset of the Hub.

    `"hub:user/name"` may be followed by `:config` and `:config:split`; an empty config is the default one and
    `"train"` the default split. In place of `user/name`, a local folder that `datasets` can load will do.
    """
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError('Streaming needs datasets: pip install "diffusers-leanvae[datasets]".') from error
    if train.endswith(".tar") or is_compressed_tar(train):
        files = expand_braces(train)
        return load_dataset("webdataset", data_files={"train": files}, split="train", streaming=True)
    name = train.removeprefix("hub:").removeprefix("hf://").removeprefix("datasets/")
    if "://" in name:
        raise ValueError(f"`train` must name tar files when it is a URL, got {train!r}.")
    name, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    return load_dataset(name, config or None, split=split or "train", streaming=True)


class VideoStream(ClipDataset):
    """Clips of a streaming dataset. Processes share its shards, or its examples in turn where shards do not divide.

    Each process downloads a block of at least `shuffle_buffer` examples while it trains on the one before, and visits
    each of them once; examples that cannot be read are passed over. The order of shards is new in every epoch.

    Args:
        stream: A `datasets.IterableDataset` with a column of videos or images. They are never decoded by `datasets`.
        options: The clips to cut.
        schedule: The steps.
        share: The part of a step that this process draws.
        seed: Everything random depends on this and on the index of the clip alone.
        images: Where image steps take their images from; `None` for random frames of the videos.
        cache_gib: Memory for decoded `images`.
        shuffle_buffer: Examples of a block, rounded up to whole steps.
    """

    def __init__(
        self,
        stream: Any,
        options: ClipOptions,
        schedule: StepSchedule,
        share: Share = ALONE,
        seed: int = 0,
        images: VideoSource | None = None,
        cache_gib: float = 4.0,
        shuffle_buffer: int = 256,
    ) -> None:
        super().__init__(options, schedule, share, seed)
        if shuffle_buffer < 1:
            raise ValueError(f"`shuffle_buffer` must be at least 1, got {shuffle_buffer}.")
        local_batch_size = schedule.batch_size // share.world_size
        self.steps_per_block = math.ceil(shuffle_buffer / local_batch_size)
        self.block_size = self.steps_per_block * local_batch_size
        num_batches = self.steps_per_block * share.num_accumulation_steps
        self.num_blocks_kept = 1 + math.ceil(_NUM_BATCHES_AHEAD / num_batches)
        self.image_order = None
        if images is not None and schedule.image_ratio > 0:
            videos = VideoSet(images, options.image_sizes, options)
            videos.fill_cache(int(cache_gib * 2**30))
            self.image_order = make_image_order(videos, schedule, [self.seed, 0])
        self.mixes_frames = images is None
        self.root = Path(tempfile.mkdtemp(prefix="leanvae-stream-"))
        self._remove = weakref.finalize(self, _remove_folder, self.root, os.getpid())
        self.reader = BlockReader(stream, self.block_size, self.root, seed, share)
        self._orders: dict[int, tuple[VideoOrder, VideoOrder | None]] = {}

    @property
    def num_skipped(self) -> int:
        # Only blocks that are on disk count.
        return sum(order.videos.num_skipped for order, _ in self._orders.values())

    def locate(self, step: int, position: int) -> tuple[VideoOrder, int, int]:
        is_image_step = self.schedule.is_image_step(step)
        if is_image_step and self.image_order is not None:
            return self.image_order, self.schedule.num_image_steps(step), position
        block = step // self.steps_per_block
        first_step = block * self.steps_per_block
        num_image_steps = self.schedule.num_image_steps(step) - self.schedule.num_image_steps(first_step)
        # Of the parts of a step, every `world_size`-th is this process's: positions count its own clips.
        count = self.schedule.num_clips(step) // self.share.num_parts
        part, within = divmod(position, count)
        position = part // self.share.world_size * count + within
        video_order, image_order = self._block_orders(block)
        if is_image_step:
            assert image_order is not None
            return image_order, num_image_steps, position
        return video_order, step - first_step - num_image_steps, position

    def batches(self, start_step: int, num_steps: int) -> StepBatches:
        return _StreamBatches(self, start_step, num_steps)

    def metadata(self, video: int) -> dict[str, Any]:
        """Return the other columns of an example, as far as they can be JSON, while its block is on disk."""
        if video < 0:
            return {}
        block, number = divmod(video, self.block_size)
        return self._block_orders(block)[0].videos.source.metadata(number)

    def describe(self) -> str:
        images = "" if self.image_order is None else f" and {len(self.image_order.videos)} images"
        return f"a stream in blocks of {self.block_size} videos per process{images}"

    def state_dict(self, step: int) -> dict[str, Any]:
        return self.reader.state_dict(step // self.steps_per_block)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:  # an empty one comes from local files, or from a process that saved none
            self.reader.load_state_dict(state)

    def close(self) -> None:
        self._remove()

    def _video(self, step: int, number: int) -> int:
        from_images = self.schedule.is_image_step(step) and self.image_order is not None
        return number if from_images else step // self.steps_per_block * self.block_size + number

    def _block_orders(self, block: int) -> tuple[VideoOrder, VideoOrder | None]:
        if block not in self._orders:
            source = self.reader.open(block)
            sizes = wanted_sizes(self.options, self.schedule, self.mixes_frames)
            videos = VideoSet(source, sizes, self.options)
            seed = [self.seed, 0, self.share.rank, block]
            local_batch_size = self.schedule.batch_size // self.share.world_size
            order = VideoOrder(videos, self.options.sizes, local_batch_size, seed)
            image_order = None
            if self.mixes_frames and self.schedule.image_ratio > 0:
                image_order = make_image_order(videos, self.schedule, seed, self.share.world_size)
            self._orders = dict(sorted(self._orders.items())[-1:])  # the one before may still be asked for
            self._orders[block] = order, image_order
        return self._orders[block]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_remove"}  # workers remove nothing


class _StreamBatches(StepBatches):
    """Index lists of a stream: the block of a batch is on disk before a worker sees its indices."""

    def __init__(self, stream: VideoStream, start_step: int, num_steps: int) -> None:
        super().__init__(stream.schedule, start_step, num_steps, stream.share)
        self.stream = stream

    def __iter__(self) -> Iterator[list[int]]:
        reader, steps_per_block = self.stream.reader, self.stream.steps_per_block
        last_block = (self.num_steps - 1) // steps_per_block
        current = -1
        coming: Future[Path] | None = None
        with ThreadPoolExecutor(max_workers=1) as thread:
            for indices in super().__iter__():
                block = indices[0] // self.schedule.clips_per_step // steps_per_block
                if block != current:
                    if coming is not None:
                        coming.result()
                    reader.fetch(block)
                    reader.forget_before(block - self.stream.num_blocks_kept)
                    coming = thread.submit(reader.fetch, block + 1) if block < last_block else None
                    current = block
                yield indices


class _BlockSource(FileSource):
    """The examples of a block. Since the files are copies, their names are tar file and key, or number in the stream.

    Args:
        folder: The block.
        first: The number of its first example.
    """

    def __init__(self, folder: Path, first: int) -> None:
        super().__init__(folder)
        self.first = first

    def name(self, number: int) -> str:
        row = self.metadata(number)
        if "__url__" in row and "__key__" in row:  # as `datasets` has it
            return f"{row['__url__']}/{row['__key__']}"
        return f"example {self.first + number} of the stream"


class BlockReader:
    """Writer of a stream to disk, block after block, each a folder of videos with a `metadata.jsonl`.

    Args:
        stream: A `datasets.IterableDataset` with a column of videos or images.
        block_size: Examples of a block.
        root: An existing folder for the blocks.
        seed: The order of shards follows from this.
        share: Which process reads; processes get shards of their own, or examples in turn.
    """

    def __init__(self, stream: Any, block_size: int, root: Path, seed: int, share: Share = ALONE) -> None:
        from datasets.distributed import split_dataset_by_node  # pyright: ignore[reportMissingImports]

        self.column = visual_column(stream)
        stream = without_decoding(stream)
        # A buffer of one shuffles the order of shards only, and holds nothing back that a state would not know of.
        stream = split_dataset_by_node(stream, share.rank, share.world_size).shuffle(seed=seed, buffer_size=1)
        self.stream, self.block_size, self.root = stream, block_size, root
        self.setting = {"block_size": block_size, "seed": seed, "rank": share.rank, "world_size": share.world_size}
        self.states: dict[int, dict[str, Any]] = {0: {"epoch": 0, "stream": {}}}  # position at the start of a block
        self.next_block, self.epoch = 0, 0
        self.examples: Iterator[dict[str, Any]] | None = None
        self.lock, self.pid = threading.Lock(), os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"lock": None, "examples": None, "pid": -1}

    def fetch(self, block: int) -> Path:
        """Return the folder of a block, reading it from the stream unless it is there already."""
        if self.pid != os.getpid():  # a worker that finds the block missing reads the stream on its own
            self.lock, self.examples, self.pid = threading.Lock(), None, os.getpid()
        with self.lock:
            folder = self.root / f"block-{block:07d}"
            if not folder.is_dir():
                self._read(block).rename(folder)
            return folder

    def open(self, block: int) -> VideoSource:
        """Return the examples of a block, as [`fetch`] gets them."""
        return _BlockSource(self.fetch(block), block * self.block_size)

    def _read(self, block: int) -> Path:
        if self.examples is None or self.next_block > block:
            self._start(max(known for known in self.states if known <= block))
        while self.next_block < block:
            for _ in range(self.block_size):
                self._next()
            self._finish()
        partial = Path(tempfile.mkdtemp(prefix="partial-", dir=self.root))
        rows = [write_example(self._next(), self.column, partial, number) for number in range(self.block_size)]
        (partial / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        self._finish()
        return partial

    def forget_before(self, block: int) -> None:
        for folder in self.root.glob("block-*"):
            if int(folder.name.removeprefix("block-")) < block:
                shutil.rmtree(folder, ignore_errors=True)
        for known in [known for known in self.states if 0 < known < block]:
            del self.states[known]

    def state_dict(self, block: int) -> dict[str, Any]:
        known = max(number for number in self.states if number <= block)
        return {**self.setting, "block": known, "position": self.states[known]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        setting = {name: state.get(name) for name in self.setting}
        if setting != self.setting:
            warnings.warn(
                f"The position in the stream is found by reading from its start: it was saved with {setting}, this is "
                f"{self.setting}.",
                stacklevel=2,
            )
            return
        self.states[state["block"]] = state["position"]

    def _start(self, block: int) -> None:
        self.next_block, self.epoch = block, self.states[block]["epoch"]
        self.stream.set_epoch(self.epoch)
        self.stream.load_state_dict(self.states[block]["stream"])
        self.examples = iter(self.stream)

    def _finish(self) -> None:
        self.next_block += 1
        self.states[self.next_block] = {"epoch": self.epoch, "stream": self.stream.state_dict()}

    def _next(self) -> dict[str, Any]:
        for _ in range(2):
            assert self.examples is not None
            example = next(self.examples, None)
            if example is not None:
                return example
            self.epoch += 1
            self.stream.set_epoch(self.epoch)
            self.stream.load_state_dict({})
            self.examples = iter(self.stream)
        raise ValueError(f"`train` must hold an example for each of {self.setting['world_size']} processes, got none.")


def visual_column(stream: Any) -> str:
    """Find the column with the videos, or else the images, by its type or (as in tar files) by its name."""
    features = stream.features
    if features is None:
        first = next(iter(stream.take(1)), {})
        features = dict.fromkeys(first)
    for kind, extensions in (("Video", VIDEO_EXTENSIONS), ("Image", IMAGE_EXTENSIONS)):
        for name, feature in features.items():
            if type(feature).__name__ == kind or f".{name.rpartition('.')[2].lower()}" in extensions:
                return name
    raise ValueError(f"`train` must have a column of videos or images, got the columns {', '.join(features)}.")


def without_decoding(stream: Any) -> Any:
    """Let `datasets` pass videos and images on as they are."""
    from datasets import Image, Video  # pyright: ignore[reportMissingImports]

    features = stream.features or {}
    for name, feature in features.items():  # every one, as each would be decoded when an example is read
        if type(feature).__name__ in ("Image", "Video"):
            stream = stream.cast_column(name, (Image if type(feature).__name__ == "Image" else Video)(decode=False))
    return stream


def write_example(example: dict[str, Any], column: str, folder: Path, number: int) -> dict[str, Any]:
    """Write the video of an example, an empty file where there is none, and return its line of `metadata.jsonl`."""
    value = example.pop(column, None)
    value = {"bytes": value, "path": None} if isinstance(value, bytes) else value or {"bytes": b"", "path": None}
    encoded, origin = value["bytes"], value["path"] or ""
    path = folder / f"{number:05d}{Path(origin).suffix}"  # what it is, is read from its first bytes
    if encoded is not None:
        path.write_bytes(encoded)
    elif Path(origin).is_file():
        try:
            path.symlink_to(Path(origin).absolute())
        except OSError:  # not everywhere permitted
            shutil.copyfile(origin, path)
    else:
        _download(origin, path)
    row = {}
    if isinstance(example.get("json"), dict):  # of a tar file; its keys are columns, as of local ones
        example = example.pop("json") | example
    for name, cell in example.items():
        try:
            row[name] = json.loads(json.dumps(cell))
        except (TypeError, ValueError):
            continue  # other media
    return row | {"file_name": path.name}  # whatever a column of this name says


def _download(origin: str, path: Path) -> None:
    path.write_bytes(b"")  # which the reader passes over, where the example names no file or one that is not there
    with suppress(FileNotFoundError, ValueError):
        place = open_path(origin)
        if isinstance(place, RemotePath):
            place.download(path)
        elif place.is_file():
            shutil.copyfile(place, path)


def _remove_folder(folder: Path, pid: int) -> None:
    if os.getpid() == pid:  # a forked worker leaves it alone
        shutil.rmtree(folder, ignore_errors=True)
