"""Memory of a job from file to file: what FFmpeg and the frames take, and steps and tiles that fit into a bound."""

import re
from contextlib import suppress
from dataclasses import dataclass

from ..models.memory_planning import OtherMemory, StreamPlan
from ..models.video_autoencoder import VideoAutoencoder
from ..video_io.containers import count_cores


# Bytes per pixel, padding included, that FFmpeg holds (`results/bench_memory*.json`, cases `codec-*`, with a margin):
# a decoder, one of a single frame, an encoder once it compresses frames, each frame of x264's look-ahead, and what a
# thread of a decoder and of an encoder adds.
_READER_BYTES, _ONE_FRAME_BYTES, _COMPRESSING_BYTES, _LOOKAHEAD_BYTES = 14, 10, 21, 3.75
_READER_THREAD_BYTES, _WRITER_THREAD_BYTES = 6.5, 4
_PADDING = 64  # pixels more along height and along width, into which motion may point
_LOOKAHEAD = 42  # frames, with those that wait to become B-frames
_LIBRARY_BYTES = 12 * 2**20  # buffers that PyTorch's kernels and FFmpeg keep, at any size
_FIRST_USE_BYTES = 18 * 2**20  # code and tables that they load with the first video of a process
_METRICS_BYTES = 12 * 16  # per pixel: float copies of a frame that PSNR and SSIM make


@dataclass(frozen=True)
class VideoJob:
    """A video and what is done to it, as far as memory depends on it.

    Attributes:
        num_frames: Frames of the video, `None` if not known.
        height: Height of the video in pixels, after resizing.
        width: Width of the video in pixels, after resizing.
        encode: Whether frames are read and encoded.
        decode: Whether latents are decoded and written.
        keeps_originals: Whether frames read are kept until their reconstruction comes.
        metrics: Whether PSNR and SSIM are computed.
    """

    num_frames: int | None
    height: int
    width: int
    encode: bool = True
    decode: bool = True
    keeps_originals: bool = False
    metrics: bool = False


def parse_memory(text: str, name: str = "max_memory") -> int:
    """Return the bytes of `"2GiB"`, `"800MiB"`, `"1.5 GB"`, or a plain number of bytes.

    Args:
        text: What came.
        name: The argument, for the message.

    Raises:
        ValueError: If `text` is nothing like that.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?b?|b)?", text.strip().lower())
    if match is None or float(match[1]) == 0:
        raise ValueError(f"`{name}` must be a size such as 2GiB or 800MiB, got {text!r}.")
    unit = match[2] or "b"
    power = "bkmgt".index(unit[0])
    return int(float(match[1]) * (1024 if "i" in unit or len(unit) == 1 else 1000) ** power)


def plan_streams(
    vae: VideoAutoencoder,
    job: VideoJob,
    max_memory: int,
    *,
    num_frames_per_step: int = 16,
    looks_ahead: bool | None = None,
) -> tuple[StreamPlan, bool]:
    """Choose how a job keeps within `max_memory`, and predict what it will take.

    Args:
        vae: The autoencoder; it must be able to stream.
        job: What is to be done.
        max_memory: Bytes above the weights for the network, the state of the streams, and all frames that wait or are
            worked on, those inside FFmpeg included.
        num_frames_per_step: Longest step to take.
        looks_ahead: Whether x264 looks ahead; `None` chooses: it does if that takes at most an eighth of `max_memory`
            and the rest fits.

    Returns:
        The plan, and whether x264 looks ahead.

    Raises:
        ValueError: If nothing fits, with the least bound that would do; or if the model's memory is not predicted.
    """
    vae.check_can_stream("max_memory")
    if looks_ahead is None:
        num_ahead = min(job.num_frames or _LOOKAHEAD, _LOOKAHEAD)
        if 8 * _LOOKAHEAD_BYTES * num_ahead * _padded(job) <= max_memory:
            with suppress(ValueError):  # what does not fit with it may fit without
                return plan_streams(vae, job, max_memory, num_frames_per_step=num_frames_per_step, looks_ahead=True)
        looks_ahead = False
    ratio = vae.spatial_compression_ratio
    plan = vae.memory_model().fit_stream(
        (-(-job.height // ratio) * ratio, -(-job.width // ratio) * ratio),
        job.num_frames,
        vae.dtype.itemsize,
        max_memory,
        max_frames_per_step=num_frames_per_step,
        encode=job.encode,
        decode=job.decode,
        others=memory_beside_network(job, looks_ahead, is_first_use=True),
    )
    return plan, looks_ahead


def frames_ahead(job: VideoJob, plan: StreamPlan, max_memory: int) -> int:
    """Return how many frames may be read ahead and, as many again, wait to be written: a step's, or those that fit.

    Args:
        job: What is to be done.
        plan: Of the job.
        max_memory: What the plan was made for.
    """
    # A frame that is written may lie beside its original.
    num_bytes = 3 * job.height * job.width * (job.encode + job.decode * (1 + job.keeps_originals))
    return min(plan.num_frames_per_step, (max_memory - plan.bound) // num_bytes)


def memory_beside_network(
    job: VideoJob, looks_ahead: bool = True, num_threads: int | None = None, is_first_use: bool = False
) -> OtherMemory:
    """Predict the memory of FFmpeg and of uint8 frames.

    Args:
        job: What is to be done.
        looks_ahead: Whether x264 looks ahead.
        num_threads: Threads of FFmpeg, one per core by default.
        is_first_use: Whether the process has not used the network and FFmpeg before.
    """
    if num_threads is None:
        num_threads = count_cores()
    num_pixels, padded = job.height * job.width, _padded(job)
    fixed = _LIBRARY_BYTES + _FIRST_USE_BYTES * is_first_use + _METRICS_BYTES * job.metrics * num_pixels
    if job.encode:
        per_pixel = _READER_BYTES + _READER_THREAD_BYTES * num_threads
        fixed += (_ONE_FRAME_BYTES if job.num_frames == 1 else per_pixel) * padded
    writes = job.decode and job.num_frames != 1
    return OtherMemory(
        fixed=round(fixed),
        per_step_frame=3 * num_pixels * job.keeps_originals,
        writer=_WRITER_THREAD_BYTES * num_threads * padded * writes,
        per_written=round(_LOOKAHEAD_BYTES * padded) * (job.decode and looks_ahead),
        max_written=_LOOKAHEAD * looks_ahead,
        compressing=_COMPRESSING_BYTES * padded * writes,
    )


def _padded(job: VideoJob) -> int:
    return (job.height + _PADDING) * (job.width + _PADDING)
