"""Latents on disk: a data set of clips encoded once, to train diffusion on without the autoencoder.

A cache is a folder of shards with raw posterior means (not normalised), `settings.json` (what it was asked to be),
`index.json` (what it is) and `statistics.json` (mean and deviation per channel). Shards are written beside and
renamed, and each is a function of the settings and its number alone. So a killed run goes on where it was, any number
of processes makes the same files, and two runs of the same settings differ in no byte.
"""

import hashlib
import io
import itertools
import json
import tarfile
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.utils.data import DataLoader, Dataset

from ..atomic import replace_file
from ..checks import check_choice, parse_dtype
from ..video_io import VideoError
from .cutting import ClipOptions, VideoShelf
from .latent_samples import as_sample, encode_batch, measure_statistics
from .named import LABEL_KEYS, NAMED_DATASETS, NamedDataset, find_caption, number_labels, open_named_dataset
from .shapes import MovingShapes
from .sources import FileSource, VideoSource, open_source


Flip = Literal["auto", "none", "random", "both"]
FileFormat = Literal["safetensors", "webdataset"]
DTYPES = ("float32", "float16")  # the keys of `checks.DTYPES` that latents may be stored in
_SUFFIXES = {"safetensors": ".safetensors", "webdataset": ".tar"}
_VERSION = 1
_BLOCK_SIZE = 64  # examples of a stream that are on disk at once


class SourceClip(NamedTuple):
    r"""A clip to encode: pixels `(3, num_frames, height, width)`, uint8 or in `[-1, 1]`, and what is known of it."""

    pixels: torch.Tensor
    class_label: int | None
    caption: str | None
    name: str


class ClipSource(Protocol):
    r"""Clips by number, each a function of its number; `None` in place of one that cannot be used."""

    class_names: tuple[str, ...] | None

    def __len__(self) -> int: ...

    def read(self, numbers: range) -> Iterator[SourceClip | None]:
        r"""The clips of ascending numbers, in order."""
        ...


class LatentItem(NamedTuple):
    r"""`latents` are float32 posterior means, not normalised, `(C, F, h, w)`."""

    latents: torch.Tensor
    class_label: int | None
    caption: str | None


class LatentFolder(Dataset[LatentItem]):
    r"""What `encode_dataset` wrote, read through memory maps: opening costs nothing, and an item its own bytes.

    Attributes:
        class_names: Names of the classes, or `None`.
        statistics: `mean` and `std`, a number per channel, and `num_items`.
        settings: What the cache was asked to be, with the config and checksum of the autoencoder.
        index: `num_items`, `num_skipped`, `shape` and `shards`.

    Raises:
        ValueError: If the folder holds no finished cache.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.settings = json.loads((self.path / "settings.json").read_text(encoding="utf-8"))
            self.index = json.loads((self.path / "index.json").read_text(encoding="utf-8"))
            self.statistics = json.loads((self.path / "statistics.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(
                f"`path` must be a finished folder of `leanvae encode-dataset`, got {str(path)!r}: {error}."
            ) from error
        names = self.index["class_names"]
        self.class_names: tuple[str, ...] | None = None if names is None else tuple(names)
        self._ends = np.cumsum([shard["num_items"] for shard in self.index["shards"]])
        self._shards: dict[int, _Shard] = {}

    def __len__(self) -> int:
        return self.index["num_items"]

    def __getitem__(self, index: int) -> LatentItem:
        shard, row = self._find(index)
        described = shard.rows[row]
        return LatentItem(shard.latents(row).float(), described["class_label"], described["caption"])

    def name(self, index: int) -> str:
        r"""Which clip of which video an item is."""
        shard, row = self._find(index)
        return shard.rows[row]["name"]

    def _find(self, index: int) -> "tuple[_Shard, int]":
        if not 0 <= index < len(self):
            raise IndexError(f"`index` must be from 0 to {len(self) - 1}, got {index}.")
        number = int(np.searchsorted(self._ends, index, side="right"))
        if number not in self._shards:
            described = self.index["shards"][number]
            self._shards[number] = _open_shard(self.path / described["file_name"])
        return self._shards[number], index - int(self._ends[number]) + len(self._shards[number].rows)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": {}}  # maps are opened anew by a worker


def encode_dataset(
    vae: Any,
    source: str,
    output: str | Path,
    *,
    clip_size: Sequence[int] = (17, 256, 256),
    num_crops: int = 1,
    flip: Flip = "auto",
    sampling: Literal["exact", "reference"] = "exact",
    stride: int | None = None,
    short_side: int | None = None,
    num_clips: int | None = None,
    seed: int = 0,
    dtype: str = "float32",
    file_format: FileFormat = "safetensors",
    shard_size: int = 256,
    batch_size: int = 8,
    num_workers: int = 0,
    progress: Callable[[int], Any] | None = None,
) -> LatentFolder:
    r"""Encode a data set of clips to a folder of latents, alone or in all processes of `torchrun`.

    Call it again with the same arguments to go on after an interruption.

    Args:
        vae: The autoencoder; it is moved to the device of the process, and works in its own dtype.
        source: `"shapes"`; a named data set as `"ucf101:folder"` (`named.NAMED_DATASETS`); or what
            `open_training_data` takes: a folder, tar shards, or a stream.
        output: Folder to write.
        clip_size: `[num_frames, height, width]`, legal for `vae`; square for named data sets.
        num_crops: Clips per video, each at a random place and time (named data sets: time).
        flip: `"none"`; `"random"`: mirror every other clip; `"both"`: store every clip as it is and mirrored;
            `"auto"`: what is usual for a named data set, else `"none"`. Moving shapes are never mirrored: `"none"`.
        sampling: Of named data sets, see `open_named_dataset`.
        stride: Distance of frames; 3 for named data sets and 1 for others by default.
        short_side: Scale larger videos down to it before cutting (not for named data sets, which have their own rule).
        num_clips: At most so many clips, not counting mirrored ones; needed for a stream, 10,000 by default for
            shapes.
        seed: All randomness.
        dtype: Of the stored latents: `"float32"` or `"float16"`.
        file_format: `"safetensors"`, or `"webdataset"`: tar files of `.npy`, `.json`, and where known `.cls`, `.txt`.
        shard_size: Clips per shard, not counting mirrored ones.
        batch_size: Clips encoded at once. Like all of the above it must stay the same when a run goes on: rounding can
            depend on it.
        num_workers: Processes that decode videos ahead, per process.
        progress: Called with the number of clips of each finished shard.

    Returns:
        The finished folder, the same in every process.

    Raises:
        ValueError: If an argument is not legal, `output` was begun with other settings, or no clip could be used.
        ImportError: If accelerate is not installed.
    """
    try:
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs
    except ImportError as error:
        raise ImportError('Encoding needs accelerate: pip install "diffusers-leanvae[train]".') from error
    counts = {"num_crops": num_crops, "shard_size": shard_size, "batch_size": batch_size}
    for name, value in counts.items() | ({"num_clips": num_clips}.items() if num_clips is not None else set()):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    check_choice("file_format", file_format, _SUFFIXES)
    asked: dict[str, Any] = dict(
        source=source, clip_size=list(clip_size), num_crops=num_crops, flip=flip, sampling=sampling, stride=stride,
        short_side=short_side, num_clips=num_clips, seed=seed,
    )  # fmt: skip
    clips = open_clips(**asked, num_workers=num_workers)
    _latent_shape(vae, clip_size)  # refuses what cannot be encoded, before anything is written
    settings = {
        "version": _VERSION,
        **asked,
        "dtype": str(parse_dtype("dtype", dtype, DTYPES)).removeprefix("torch."),
        "file_format": file_format,
        "shard_size": shard_size,
        "batch_size": batch_size,
        "num_source_clips": len(clips),
        "vae": _describe(vae),
    }
    # A process may have to wait for the slowest one's last shard.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=2))])
    folder = Path(output)
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        _begin(folder, settings)
    accelerator.wait_for_everyone()
    _begin(folder, settings)
    device = accelerator.device if accelerator.num_processes > 1 else vae.device
    vae = vae.to(device).eval()
    num_shards = -(-len(clips) // shard_size)
    paths = [folder / f"latents-{number:05d}{_SUFFIXES[file_format]}" for number in range(num_shards)]
    for number in range(accelerator.process_index, num_shards, accelerator.num_processes):
        numbers = range(number * shard_size, min((number + 1) * shard_size, len(clips)))
        if not paths[number].exists():
            latents, rows = _encode(vae, clips.read(numbers), settings, device)
            _write(paths[number], _SERIALIZERS[file_format](latents, rows, f"{number:05d}"))
        if progress is not None:
            progress(len(numbers))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and not (folder / "index.json").exists():
        _finish(folder, paths, clips, settings)
    accelerator.wait_for_everyone()
    return LatentFolder(folder)


# --- Where clips come from -------------------------------------------------------------------------------------------


def open_clips(
    source: str,
    clip_size: Sequence[int],
    num_crops: int = 1,
    flip: Flip = "auto",
    sampling: Literal["exact", "reference"] = "exact",
    stride: int | None = None,
    short_side: int | None = None,
    num_clips: int | None = None,
    seed: int = 0,
    num_workers: int = 0,
) -> ClipSource:
    r"""The clips that `encode_dataset` encodes, with its arguments."""
    if len(clip_size) != 3 or min(clip_size) < 1:
        raise ValueError(f"`clip_size` must be [num_frames, height, width], got {list(clip_size)}.")
    check_choice("flip", flip, get_args(Flip))
    num_frames, height, width = clip_size
    if source == "shapes":
        if flip not in ("auto", "none") or num_crops > 1:
            raise ValueError(
                f"`flip` and `num_crops` must be 'none' and 1 for shapes, which are told by their direction, got "
                f"{flip!r} and {num_crops}."
            )
        return _ShapeClips(MovingShapes(num_frames, height, width, seed, num_clips or 10_000), num_workers)
    name, _, folder = source.partition(":")
    if name in NAMED_DATASETS:
        if height != width or short_side is not None:
            raise ValueError(
                f"`clip_size` must be square and `short_side` None for {name}, got {list(clip_size)} and {short_side}."
            )
        named = open_named_dataset(
            name,
            folder,
            num_frames,
            height,
            sampling,
            seed,
            sample_stride=stride or 3,
            flip={"auto": None, "random": True}.get(flip, False),
            num_draws=num_crops,
        )
        return _NamedClips(named, num_clips, num_workers)
    options = ClipOptions([list(clip_size)], short_side=short_side, stride=stride or 1, flip=flip == "random")
    if source.startswith("hub:") or "://" in source:
        if num_clips is None:
            raise ValueError("`num_clips` must be given for a stream, got None.")
        return _StreamClips(source, options, num_crops, num_clips, seed)
    return _FileClips(open_source(source), options, num_crops, num_clips, seed, num_workers)


class _MapClips(Dataset[SourceClip | None]):
    """Clips that can be asked for in any order, so that workers can share them."""

    def __init__(self, num_clips: int, class_names: tuple[str, ...] | None, num_workers: int) -> None:
        self.num_clips, self.class_names, self.num_workers = num_clips, class_names, num_workers

    def __len__(self) -> int:
        return self.num_clips

    def __getitem__(self, number: int) -> SourceClip | None:
        raise NotImplementedError

    def read(self, numbers: range) -> Iterator[SourceClip | None]:
        yield from DataLoader(self, sampler=numbers, batch_size=None, num_workers=self.num_workers)


class _ShapeClips(_MapClips):
    def __init__(self, shapes: MovingShapes, num_workers: int) -> None:
        super().__init__(len(shapes), shapes.class_names, num_workers)
        self.shapes = shapes

    def __getitem__(self, number: int) -> SourceClip:
        return SourceClip(*self.shapes[number], f"shapes-{self.shapes.seed}#{number}")


class _NamedClips(_MapClips):
    def __init__(self, clips: NamedDataset, num_clips: int | None, num_workers: int) -> None:
        super().__init__(min(len(clips), num_clips or len(clips)), clips.class_names, num_workers)
        self.clips = clips

    def __getitem__(self, number: int) -> SourceClip | None:
        try:
            clip = self.clips.clip(number)
        except VideoError as error:
            warnings.warn(f"Skipping a video: {error}", stacklevel=2)
            return None
        draw = number % self.clips.num_draws
        return SourceClip(*clip, f"{self.clips.metadata(number)['file_name']}#{draw}")


class _FileClips(_MapClips):
    """Clips of the files of a folder or of shards, as many of each as there are crops."""

    def __init__(
        self,
        source: VideoSource,
        options: ClipOptions,
        num_crops: int,
        num_clips: int | None,
        seed: int,
        num_workers: int,
    ) -> None:
        rows = [source.metadata(number) for number in range(len(source))]
        self.labels, class_names = number_labels(rows)
        total = len(source) * num_crops
        super().__init__(min(total, num_clips or total), class_names, num_workers)
        self.shelf = VideoShelf(source, options.sizes, options)
        self.num_crops, self.seed = num_crops, seed

    def __getitem__(self, number: int) -> SourceClip | None:
        video, crop = divmod(number, self.num_crops)
        pixels = _cut(self.shelf, video, [self.seed, number])
        if pixels is None:
            return None
        row = self.shelf.source.metadata(video)
        return SourceClip(pixels, self.labels[video], find_caption(row), f"{row['file_name']}#{crop}")


class _StreamClips:
    """Clips of a stream. Every process reads all of it, from its start, so that the clips depend on nothing else.

    Beyond the end of the stream it begins anew, with other crops.
    """

    def __init__(self, source: str, options: ClipOptions, num_crops: int, num_clips: int, seed: int) -> None:
        from .streams import _BlockReader, open_stream

        stream = open_stream(source)
        self.folder = tempfile.TemporaryDirectory(prefix="leanvae-stream-")
        self.reader = _BlockReader(stream, _BLOCK_SIZE, Path(self.folder.name), seed, rank=0, world_size=1)
        self.options, self.num_crops, self.num_clips, self.seed = options, num_crops, num_clips, seed
        columns = stream.features or {}
        names = next((columns[key].names for key in LABEL_KEYS if hasattr(columns.get(key), "names")), None)
        self.class_names = None if names is None else tuple(names)

    def __len__(self) -> int:
        return self.num_clips

    def read(self, numbers: range) -> Iterator[SourceClip | None]:
        opened, shelf = -1, None
        for number in numbers:
            example, crop = divmod(number, self.num_crops)
            block, place = divmod(example, _BLOCK_SIZE)
            if shelf is None or block != opened:
                opened = block
                shelf = VideoShelf(FileSource(self.reader.fetch(block)), self.options.sizes, self.options)
                self.reader.forget_before(block)
            pixels = _cut(shelf, place, [self.seed, number])
            if pixels is None:
                yield None
                continue
            row = shelf.source.metadata(place)
            (label,), names = number_labels([row])
            if names is not None:
                raise ValueError(f"Labels of a stream must be numbers, got {names[0]!r}.")
            yield SourceClip(pixels, label, find_caption(row), f"{example}#{crop}")


def _cut(shelf: VideoShelf, number: int, seed: list[int]) -> torch.Tensor | None:
    if shelf.shape(number) is None:
        return None
    return shelf.cut(number, shelf.sizes[0], 1.0, np.random.default_rng(seed))


# --- Shards ----------------------------------------------------------------------------------------------------------


class _Shard(Protocol):
    rows: list[dict[str, Any]]  # class_label, caption, name of every item

    def latents(self, row: int) -> torch.Tensor: ...


class _SafetensorsShard:
    def __init__(self, path: Path) -> None:
        self.file = safe_open(path, "pt")
        self.rows = json.loads(self.file.metadata()["items"])
        self.slice = self.file.get_slice("latents")

    def latents(self, row: int) -> torch.Tensor:
        return self.slice[row : row + 1][0]


class _TarShard:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.offsets: list[int] = []
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.name.endswith(".npy"):
                    self.offsets.append(member.offset_data)
                elif member.name.endswith(".json"):
                    content = archive.extractfile(member)
                    assert content is not None
                    self.rows.append(json.load(content))

    def latents(self, row: int) -> torch.Tensor:
        with open(self.path, "rb") as file:
            file.seek(self.offsets[row])
            return torch.from_numpy(np.lib.format.read_array(file))


def _open_shard(path: Path) -> _Shard:
    try:
        return _TarShard(path) if path.suffix == ".tar" else _SafetensorsShard(path)
    except (OSError, SafetensorError, tarfile.TarError) as error:
        raise ValueError(f"`path` must hold sound shards, got {str(path)!r}: {error}.") from error


def _to_safetensors(latents: torch.Tensor, rows: list[dict[str, Any]], key: str) -> bytes:
    # One entry of metadata only: the order of several is not the same in every run.
    return save({"latents": latents}, {"items": json.dumps(rows)})


def _to_tar(latents: torch.Tensor, rows: list[dict[str, Any]], key: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number, row in enumerate(rows):
            array = io.BytesIO()
            np.save(array, latents[number].numpy())
            parts = {"npy": array.getvalue(), "json": json.dumps(row).encode()}
            if row["class_label"] is not None:
                parts["cls"] = str(row["class_label"]).encode()
            if row["caption"] is not None:
                parts["txt"] = row["caption"].encode()
            for extension, content in parts.items():
                member = tarfile.TarInfo(f"{key}-{number:05d}.{extension}")  # no date, no owner
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


_SERIALIZERS = {"safetensors": _to_safetensors, "webdataset": _to_tar}


def _encode(
    vae: Any, clips: Iterator[SourceClip | None], settings: dict[str, Any], device: torch.device
) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """The latents of a shard, `(n, C, F, h, w)`, and what is known of each."""
    latents = [
        torch.empty(0, *_latent_shape(vae, settings["clip_size"]), dtype=parse_dtype("dtype", settings["dtype"]))
    ]
    rows: list[dict[str, Any]] = []
    usable = (clip for clip in clips if clip is not None)
    while batch := list(itertools.islice(usable, settings["batch_size"])):
        pixels = as_sample(torch.stack([clip.pixels for clip in batch]).to(device)).to(vae.dtype)
        encoded = [encode_batch(vae, pixels)]
        described = [{"class_label": clip.class_label, "caption": clip.caption, "name": clip.name} for clip in batch]
        if settings["flip"] == "both":
            encoded.append(encode_batch(vae, pixels.flip(-1)))
            described = [entry for row in described for entry in (row, row | {"name": f"{row['name']}#mirrored"})]
        stored = torch.stack(encoded, 1).flatten(0, 1).to("cpu", latents[0].dtype)
        if not stored.isfinite().all():
            raise ValueError(f"`dtype` must hold the latents, got {settings['dtype']}, in which some are not finite.")
        latents.append(stored)
        rows += described
    return torch.cat(latents), rows


def _latent_shape(vae: Any, clip_size: Sequence[int]) -> tuple[int, int, int, int]:
    num_frames, height, width = clip_size
    num_latent_frames, ratio = vae.num_latent_frames(num_frames), vae.spatial_compression_ratio
    if vae.num_sample_frames(num_latent_frames) != num_frames or height % ratio or width % ratio:
        raise ValueError(
            f"`clip_size` must be [{vae.temporal_compression_ratio} * n + 1 frames, then height and width, multiples "
            f"of {ratio}], got {list(clip_size)}."
        )
    return vae.latent_channels, num_latent_frames, height // ratio, width // ratio


# --- Files -----------------------------------------------------------------------------------------------------------


def _describe(vae: Any) -> dict[str, Any]:
    """Which autoencoder it is: class, config, and a checksum of the names and bytes of its weights."""
    checksum = hashlib.sha256()
    for name, weight in sorted(vae.state_dict().items()):
        checksum.update(name.encode())
        checksum.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    config = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    return {
        "class": type(vae).__name__,
        "dtype": str(vae.dtype).removeprefix("torch."),
        "weights_sha256": checksum.hexdigest(),
        "config": config,
    }


def _begin(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a new cache, or refuse to go on with others than it was begun with."""
    path = folder / "settings.json"
    text = json.dumps(settings, indent=2) + "\n"
    if not path.exists():
        _write(path, text.encode())
    begun = json.loads(path.read_text(encoding="utf-8"))
    new = json.loads(text)
    different = [key for key in {**begun, **new} if begun.get(key) != new.get(key)]
    if different:
        key = different[0]
        raise ValueError(
            f"`output` must be a new folder, or one begun with the same settings, got {str(folder)!r}, where `{key}` "
            f"was {begun.get(key)!r} and is now {new.get(key)!r}."
        )


def _finish(folder: Path, paths: list[Path], clips: ClipSource, settings: dict[str, Any]) -> None:
    """Write statistics and index, the index last: it marks the cache as whole."""
    shards = [_open_shard(path) for path in paths]
    counts = [len(shard.rows) for shard in shards]
    if not sum(counts):
        raise ValueError(f"`source` must hold at least one usable clip, got none of {len(clips)}.")
    first = next(shard for shard in shards if shard.rows).latents(0)

    def batches() -> Iterator[torch.Tensor]:
        for shard in shards:
            for row in range(len(shard.rows)):
                yield shard.latents(row)[None]

    mean, std = measure_statistics(batches(), first.shape[0])
    statistics = {"mean": mean, "std": std, "num_items": sum(counts)}
    index = {
        "num_items": sum(counts),
        "num_skipped": len(clips) - sum(counts) // (2 if settings["flip"] == "both" else 1),
        "shape": list(first.shape),
        "class_names": None if clips.class_names is None else list(clips.class_names),
        "shards": [{"file_name": path.name, "num_items": count} for path, count in zip(paths, counts, strict=True)],
    }
    _write(folder / "statistics.json", (json.dumps(statistics, indent=2) + "\n").encode())
    _write(folder / "index.json", (json.dumps(index, indent=2) + "\n").encode())


def _write(path: Path, content: bytes) -> None:
    with replace_file(path) as partial:
        partial.write_bytes(content)
