"""Opening of the training data that a recipe names."""

from collections.abc import Sequence

from .cutting import ClipOptions
from .datasets import ClipDataset, TrainingClips
from .metadata import list_captions
from .schedule import ALONE, Share, StepSchedule
from .sources import open_source
from .streams import VideoStream, is_stream, open_stream


def open_training_data(
    train: str,
    *,
    batch_size: int,
    num_accumulation_steps: int = 1,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    clip_sizes: Sequence[Sequence[int]] = ((17, 64, 64),),
    aspect_buckets: bool = False,
    short_side: int | None = None,
    stride: int | Sequence[int] = 1,
    max_zoom_out: float = 1.0,
    flip: bool = True,
    rescale_factors: Sequence[float] = (1.0,),
    image_ratio: float = 0.0,
    image_batch_factor: int = 1,
    images: str | None = None,
    procedural: float = 0.0,
    cache_gib: float = 4.0,
    shuffle_buffer: int = 256,
    caption_column: str | None = None,
) -> ClipDataset:
    """Open videos for training: `DataLoader(data, batch_sampler=data.batches(start_step, num_steps))`.

    Args:
        train: A folder (searched recursively; with a `metadata.jsonl`, `.csv` or `.parquet` in it, what that lists),
            one video, uncompressed WebDataset shards (a folder of them, `"shards/{000..003}.tar"` or
            `"shards/*.tar"`), a folder at a URL of fsspec (`"s3://bucket/clips"`), shards at a URL, or a dataset of
            the Hub as `"hub:user/name[:config][:split]"` or `"hf://user/name..."`. The last two are streamed, see
            `VideoStream`.
        batch_size: Clips of one optimizer step, over all processes and accumulation steps.
        num_accumulation_steps: Batches per step and process.
        rank: This process.
        world_size: Number of processes.
        seed: Everything random depends on this and on the index of the clip alone.
        clip_sizes: `[num_frames, height, width]` choices; one is drawn per step.
        aspect_buckets: Give every video to the aspect ratio of `clip_sizes` that is nearest to its own; a step takes
            videos of one ratio, and one size of that ratio. Every video is probed in the beginning.
        short_side: Scale videos down until the short side is at most this; `None` keeps them as they are.
        stride: Frame spacing, or `[lowest, highest]` to draw it per clip; less where a video is short.
        max_zoom_out: A clip is cut from a window 1 to `max_zoom_out` times its size and scaled down.
        flip: Mirror every other clip left to right.
        rescale_factors: One of them is drawn per step, and the step's clips are scaled down by it, height and width
            rounded to multiples of 16.
        image_ratio: The share of steps whose clips are single frames.
        image_batch_factor: Such a step has this many times more clips.
        images: Source of single frames, named like `train` but local; `None` for random frames of the videos.
        procedural: The share of clips, of images too, in whose place comes footage of `draw_footage`.
        cache_gib: Memory for decoded videos, in each process; streams are not cached.
        shuffle_buffer: How many videos of a stream are held on disk by each process and shuffled among each other.
        caption_column: The column of the metadata file, key of the `.json` members of shards, or column of the
            dataset of the Hub that holds the captions, a text or a list of texts; `None` for the first of `caption`,
            `text`, `txt` and `captions` that is not empty. `data.captions(batch.video[0])` returns those of a video.

    Raises:
        ValueError: If `train` or `images` names nothing usable, or an option is not legal.
        ImportError: If a stream is asked for and `datasets` is not installed.
    """
    return open_clip_dataset(
        train,
        ClipOptions(clip_sizes, aspect_buckets, short_side, stride, max_zoom_out, flip, rescale_factors),
        StepSchedule(batch_size, image_ratio, image_batch_factor, procedural),
        Share(rank, world_size, num_accumulation_steps),
        seed=seed,
        images=images,
        cache_gib=cache_gib,
        shuffle_buffer=shuffle_buffer,
        caption_column=caption_column,
    )


def open_clip_dataset(
    train: str,
    options: ClipOptions,
    schedule: StepSchedule,
    share: Share = ALONE,
    *,
    seed: int = 0,
    images: str | None = None,
    cache_gib: float = 4.0,
    shuffle_buffer: int = 256,
    caption_column: str | None = None,
) -> ClipDataset:
    """Open videos for training, as [`open_training_data`] does, by the records that its arguments make up."""
    image_source = None if images is None else open_source(images)
    if is_stream(train):
        stream = open_stream(train)
        data = VideoStream(stream, options, schedule, share, seed, image_source, cache_gib, shuffle_buffer)
    else:
        source = open_source(train)
        if caption_column is not None:  # refuses one that is not there
            list_captions([source.metadata(number) for number in range(len(source))], caption_column)
        data = TrainingClips(source, options, schedule, share, seed, image_source, cache_gib)
    data.caption_column = caption_column
    return data
