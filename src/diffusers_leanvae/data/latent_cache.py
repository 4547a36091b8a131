"""Latents on disk: a data set of clips encoded once, to train diffusion on without the autoencoder.

A cache is a folder of shards with raw posterior means (not normalised), `settings.json` (the settings it was built
with), `index.json` (its contents) and `statistics.json` (mean and deviation per channel). Each shard appears when it
is complete, and is a function of the settings and its number alone. So a killed run resumes where it stopped, any
number of processes makes the same files, and two runs of the same settings differ in no byte.
"""

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ..checks import check_choice, check_place, parse_dtype
from ..description import public_config
from ..latents import encode_batch, measure_statistics
from ..launching import start_accelerator
from ..models.video_autoencoder import VideoAutoencoder
from ..stages import ahead
from ..video_io.pixels import as_sample
from .clip_lists import CHECKSUMS, ClipList, ClipSelection, Flip, SourceClip, open_clip_list
from .latent_shards import CACHE_VERSION, SHARD_SUFFIXES, FileFormat, LatentFolder, open_shard, serialize_shard
from .named import Sampling
from .ray_cache import encode_with_ray
from .storage import AnyPath, begin_settings, fetched, list_names, open_path, write_json, write_whole
from .streams import is_stream
from .text_cache import begin_texts, checksum_of_weights, encode_captions, open_text_encoder
from .text_shards import TEXT_SETTINGS


Engine = Literal["processes", "ray"]
SHARD_DTYPES = ("float32", "float16")
_Encoded = tuple[torch.Tensor, list[dict[str, Any]]]  # latents of a batch, and what is known of each


@dataclass(frozen=True)
class ShardOptions:
    """Size, format and dtype of the shards of a cache.

    Args:
        dtype: Dtype of the stored latents, `"float32"` or `"float16"`.
        file_format: `"safetensors"`, or `"webdataset"`: tar files of `.npy`, `.json`, and where known `.cls`, `.txt`.
        shard_size: Clips per shard, not counting mirrored ones.
        batch_size: Clips encoded at once.
    """

    dtype: str = "float32"
    file_format: FileFormat = "safetensors"
    shard_size: int = 256
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name, value in (("shard_size", self.shard_size), ("batch_size", self.batch_size)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        parse_dtype("dtype", self.dtype, SHARD_DTYPES)
        check_choice("file_format", self.file_format, SHARD_SUFFIXES)

    @property
    def torch_dtype(self) -> torch.dtype:
        return parse_dtype("dtype", self.dtype)


def encode_dataset(
    vae: VideoAutoencoder,
    source: str,
    output: str | Path,
    *,
    clip_size: Sequence[int] = (17, 256, 256),
    num_crops: int = 1,
    flip: Flip = "auto",
    sampling: Sampling = "exact",
    stride: int | None = None,
    short_side: int | None = None,
    num_clips: int | None = None,
    seed: int = 0,
    caption_column: str | None = None,
    num_captions: int = 1,
    dtype: str = "float32",
    file_format: FileFormat = "safetensors",
    shard_size: int = 256,
    batch_size: int = 8,
    num_workers: int = 0,
    text_encoder: str | Path | None = None,
    text_max_length: int | None = None,
    text_dtype: str = "float32",
    engine: Engine = "processes",
    num_encoders: int | None = None,
    progress: Callable[[int, int], Any] | None = None,
    text_progress: Callable[[int, int], Any] | None = None,
) -> LatentFolder:
    """Encode a data set of clips to a folder of latents: alone, in all processes of `torchrun`, or with Ray.

    Call it again with the same arguments to resume after an interruption.

    Args:
        vae: The autoencoder; it is moved to the device of the process, and works in its own dtype.
        source: `"shapes"` or `"scenes"`; a named data set as `"ucf101:folder"` (`named.NAMED_DATASETS`); or what
            `open_training_data` takes: a folder, tar shards, or a stream.
        output: Folder to write, here or at a URL such as `"s3://bucket/latents"`, see `storage.open_path`.
        clip_size: `[num_frames, height, width]`, legal for `vae`; square for named data sets.
        num_crops: Clips per video, each at a random place and time (named data sets: time).
        flip: `"none"`; `"random"`: mirror every other clip; `"both"`: store every clip as it is and mirrored;
            `"auto"`: what is usual for a named data set, else `"none"`. What is drawn is never mirrored: `"none"`.
        sampling: Of named data sets, see `open_named_dataset`.
        stride: Frame spacing; 3 for named data sets and 1 for others by default.
        short_side: Scale larger videos down to it before cutting (not for named data sets, which have their own rule).
        num_clips: Maximum number of clips, not counting mirrored ones; required for a stream, 10,000 by default for
            what is drawn.
        seed: Seed of everything random.
        caption_column: The column of the metadata file, key of the `.json` members of shards, or column of the
            dataset of the Hub that holds the captions, a text or a list of texts; `None` for the first of `caption`,
            `text`, `txt` and `captions` that is not empty.
        num_captions: Descriptions of each clip of scenes.
        dtype: Dtype of the stored latents, `"float32"` or `"float16"`.
        file_format: `"safetensors"`, or `"webdataset"`: tar files of `.npy`, `.json`, and where known `.cls`, `.txt`.
        shard_size: Clips per shard, not counting mirrored ones.
        batch_size: Clips encoded at once. Like all of the above it must stay the same when a run resumes, since
            rounding can depend on it.
        text_encoder: A text encoder that `load_text_encoder` takes, to store the embeddings of all captions with the
            latents. It may be given later, for latents that are there already.
        text_max_length: Tokens that captions are cut to: 120 by default, or as many as the tokenizer takes.
        text_dtype: Dtype that the text encoder works in and embeddings are stored in: `"float32"`, `"bfloat16"` or
            `"float16"`.
        num_workers: Processes that decode videos ahead, per process. With Ray: on all machines together, at most; 0
            for as many as there are processors.
        engine: `"processes"`, or `"ray"`: Ray Data shares the work between processes that read and processes that
            encode, on this machine or on a cluster, see `ray_cache.encode_with_ray`. The files are the same.
        num_encoders: Processes of Ray that encode; by default one per GPU, or one per two processors without GPUs.
        progress: Called with the number of clips of each finished shard, and of all that this process encodes.
        text_progress: The same of clips whose captions are encoded.

    Returns:
        The finished folder, the same in every process.

    Raises:
        ValueError: If an argument is not legal, `output` was begun with other settings or of other clips, or no clip
            could be used.
        ImportError: If accelerate, or Ray where it is asked for, is not installed.
    """
    selection = ClipSelection(
        source,
        list(clip_size),
        num_crops,
        flip,
        sampling,
        stride,
        short_side,
        num_clips,
        seed,
        caption_column,
        num_captions,
    )
    options = ShardOptions(dtype, file_format, shard_size, batch_size)
    check_choice("engine", engine, get_args(Engine))
    if num_encoders is not None and (engine != "ray" or num_encoders < 1):
        raise ValueError(f"`num_encoders` must be at least 1, and None without Ray, got {num_encoders}.")
    folder = _open_folder(output)
    encoder, text_settings = None, None
    if text_encoder is not None:
        encoder, text_settings = open_text_encoder(text_encoder, text_max_length, text_dtype)
    elif text_max_length is not None:
        raise ValueError(f"`text_max_length` must be None without `text_encoder`, got {text_max_length}.")
    try:
        from accelerate.utils import InitProcessGroupKwargs
    except ImportError as error:
        raise ImportError('Encoding needs accelerate: pip install "diffusers-leanvae[train]".') from error
    clips = open_clip_list(selection, 0 if engine == "ray" else num_workers)  # the readers of Ray read each by itself
    if encoder is not None and clips.has_captions is False:
        raise ValueError(f"`text_encoder` must be None where no clip has a caption, as in {source!r}.")
    shape = _latent_shape(vae, selection.clip_size)  # refuses what cannot be encoded, before anything is written
    settings = {
        "version": CACHE_VERSION,
        **asdict(selection),
        **asdict(options),
        "dtype": str(options.torch_dtype).removeprefix("torch."),
        "num_source_clips": len(clips),
        **clips.checksums,
        "vae": _describe(vae),
    }
    # A process may have to wait for the slowest one's last shard.
    accelerator = start_accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=2))])
    if engine == "ray" and accelerator.num_processes > 1:
        raise ValueError(f"`engine` must be 'processes' in a job of {accelerator.num_processes} processes, got 'ray'.")
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        _begin(folder, settings, text_settings, partial(_discard, folder))
    accelerator.wait_for_everyone()
    _begin(folder, settings, text_settings)
    device = accelerator.device if accelerator.num_processes > 1 else vae.device
    num_shards = -(-len(clips) // options.shard_size)
    paths = [folder / f"latents-{number:05d}{SHARD_SUFFIXES[options.file_format]}" for number in range(num_shards)]
    own = range(accelerator.process_index, num_shards, accelerator.num_processes)
    total = sum(len(_clips_of(number, clips, options)) for number in own)
    count = progress or (lambda number, total: None)
    missing = []
    for number in own:
        if paths[number].exists():
            count(len(_clips_of(number, clips, options)), total)
        else:
            missing.append(number)
    encode = partial(_encode, is_doubled=selection.flip == "both", options=options)
    if engine == "ray":
        num_readers = 1 if is_stream(source) else num_workers or None  # a stream is read from front to back
        open_reader = partial(_open_reader, selection if is_stream(source) else clips, options)
        encoded = encode_with_ray(missing, open_reader, vae.eval(), encode, num_readers, num_encoders)
    else:
        vae = vae.eval().to(device)  # pyright: ignore[reportArgumentType]  # diffusers wraps `to`
        # Where processes read ahead, no thread has to; nor should it start them, while others work.
        encoded = _encode_shards(missing, clips, options, partial(encode, vae), num_ahead=0 if num_workers else 1)
    with closing(encoded):
        for number, batches in encoded:
            latents = torch.cat([torch.empty(0, *shape, dtype=options.torch_dtype), *(batch for batch, _ in batches)])
            rows = [row for _, described in batches for row in described]
            _begin(folder, settings)  # another run may have replaced them while there was no latent yet
            write_whole(paths[number], serialize_shard(latents, rows, f"{number:05d}", options.file_format))
            count(len(_clips_of(number, clips, options)), total)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and not (folder / "index.json").exists():
        _finish(folder, paths, clips, shape, is_doubled=selection.flip == "both")
    accelerator.wait_for_everyone()
    if encoder is not None and text_settings is not None:
        encoder.model.to(device)
        encode_captions(LatentFolder(output), encoder, text_settings, accelerator, text_progress)
    return LatentFolder(output)


def _clips_of(number: int, clips: ClipList, options: ShardOptions) -> range:
    return range(number * options.shard_size, min((number + 1) * options.shard_size, len(clips)))


def _open_reader(
    clips: ClipList | ClipSelection, options: ShardOptions
) -> Callable[[int], Iterator[list[SourceClip]]]:
    """Return the function that reads a shard: of an opened list, or of a selection, as a stream is, opened here."""
    return partial(_read, clips=open_clip_list(clips) if isinstance(clips, ClipSelection) else clips, options=options)


def _read(number: int, clips: ClipList, options: ShardOptions) -> Iterator[list[SourceClip]]:
    """Read the clips of a shard that can be used, in the batches to encode."""
    usable = (clip for clip in clips.read(_clips_of(number, clips, options)) if clip is not None)
    while batch := list(itertools.islice(usable, options.batch_size)):
        yield batch


def _encode_shards(
    numbers: Sequence[int],
    clips: ClipList,
    options: ShardOptions,
    encode: Callable[[list[SourceClip]], _Encoded],
    num_ahead: int,
) -> Generator[tuple[int, list[_Encoded]], None, None]:
    """Encode shards, of which so many batches are read ahead, those of the next shard too."""
    batches = (
        (number, batch)
        for number in numbers
        for batch in itertools.chain(_read(number, clips, options), [None])  # which ends the shard
    )
    encoded: list[_Encoded] = []
    with ahead(batches, num_ahead) as read:
        for number, batch in read:
            if batch is not None:
                encoded.append(encode(batch))
                continue
            yield number, encoded
            encoded = []


def _encode(vae: VideoAutoencoder, batch: list[SourceClip], *, is_doubled: bool, options: ShardOptions) -> _Encoded:
    """Encode a batch: latents `(n, C, F, h, w)` on the CPU, and label, captions and name of each."""
    pixels = as_sample(torch.stack([clip.pixels for clip in batch]).to(vae.device)).to(vae.dtype)
    encoded = [encode_batch(vae, pixels)]
    rows = [{"class_label": clip.class_label, "captions": list(clip.captions), "name": clip.name} for clip in batch]
    if is_doubled:
        encoded.append(encode_batch(vae, pixels.flip(-1)))
        rows = [entry for row in rows for entry in (row, row | {"name": f"{row['name']}#mirrored"})]
    latents = torch.stack(encoded, 1).flatten(0, 1).to("cpu", options.torch_dtype)
    if not latents.isfinite().all():
        raise ValueError(
            f"`dtype` (`--save-dtype`) must hold the latents, got {options.dtype}, in which some are not finite."
        )
    return latents, rows


def _latent_shape(vae: VideoAutoencoder, clip_size: Sequence[int]) -> tuple[int, int, int, int]:
    num_frames, height, width = clip_size
    num_latent_frames, ratio = vae.num_latent_frames(num_frames), vae.spatial_compression_ratio
    if vae.num_sample_frames(num_latent_frames) != num_frames or height % ratio or width % ratio:
        raise ValueError(
            f"`clip_size` must be [{vae.temporal_compression_ratio} * n + 1 frames, then height and width, multiples "
            f"of {ratio}], got {list(clip_size)}."
        )
    return vae.latent_channels, num_latent_frames, height // ratio, width // ratio


# --- Files -----------------------------------------------------------------------------------------------------------


def _describe(vae: VideoAutoencoder) -> dict[str, Any]:
    """Describe an autoencoder: class, config, and a checksum of the names and bytes of its weights."""
    return {
        "class": type(vae).__name__,
        "dtype": str(vae.dtype).removeprefix("torch."),
        "weights_sha256": checksum_of_weights(vae),
        "config": public_config(vae.config),
    }


def _open_folder(output: str | Path) -> AnyPath:
    if not str(output):  # which as a path is the current folder
        raise ValueError("`output` must not be empty, got ''.")
    folder = open_path(output)
    if isinstance(folder, Path):
        check_place("`output`", folder, folder)
    return folder


def _begin(
    folder: AnyPath,
    settings: dict[str, Any],
    text_settings: dict[str, Any] | None = None,
    discard: Callable[[], bool] = lambda: False,
) -> None:
    """Write the settings of a new cache, or refuse settings other than those it was begun with.

    Args:
        folder: The cache.
        settings: The settings.
        text_settings: Of the text encoder, if there is one.
        discard: Of [`begin_settings`].
    """
    difference = begin_settings(folder / "settings.json", settings, recent=CHECKSUMS, discard=discard)
    if difference is not None:
        raise ValueError(
            f"`output` must be a new folder, or one begun with the same settings, got {str(folder)!r}, where "
            f"{difference}."
        )
    if text_settings is not None:
        begin_texts(folder, text_settings)


def _discard(folder: AnyPath) -> bool:
    """Remove the files of a cache if it holds no latent, and tell whether so it was."""
    names = list_names(folder)
    shards = [name for name in names if name.startswith("latents-") and name.endswith(tuple(SHARD_SUFFIXES.values()))]
    for name in shards:
        with fetched(folder / name) as local, suppress(ValueError):
            if not open_shard(local).rows:
                continue
        return False
    for name in (*shards, *{TEXT_SETTINGS, "settings.json"}.intersection(names)):
        (folder / name).unlink()
    return True


def _finish(
    folder: AnyPath, paths: Sequence[AnyPath], clips: ClipList, shape: Sequence[int], is_doubled: bool
) -> None:
    """Write statistics and index, the index last: it marks the cache as complete."""
    counts, encoded, num_captions = [], set(), 0

    def latents() -> Iterator[torch.Tensor]:
        nonlocal num_captions
        for path in paths:
            with fetched(path) as local:
                shard = open_shard(local)
                counts.append(len(shard.rows))
                encoded.update(row["name"] for row in shard.rows)
                num_captions += sum(len(row["captions"]) for row in shard.rows)
                for row in range(len(shard.rows)):
                    yield shard.latents(row)[None]

    found = latents()
    first = next(found, None)
    if first is None:
        _discard(folder)
        if isinstance(folder, Path):
            with suppress(OSError):  # where there is something else
                folder.rmdir()
        raise ValueError(f"`source` must hold at least one usable clip, got none of {len(clips)}.")
    mean, std = measure_statistics(itertools.chain((first,), found), shape[0])
    statistics = {"mean": mean, "std": std, "num_items": sum(counts)}
    num_skipped = len(clips) - sum(counts) // (2 if is_doubled else 1)
    names = map(clips.name, range(len(clips))) if num_skipped else ()
    index = {
        "num_items": sum(counts),
        "num_skipped": num_skipped,
        "skipped": [name for name in names if name not in encoded],
        "num_captions": num_captions,
        "shape": list(shape),
        "class_names": None if clips.class_names is None else list(clips.class_names),
        "shards": [{"file_name": path.name, "num_items": count} for path, count in zip(paths, counts, strict=True)],
    }
    write_json(folder / "statistics.json", statistics)
    write_json(folder / "index.json", index)
