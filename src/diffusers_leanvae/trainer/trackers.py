"""The trackers of a run: TensorBoard, trackio, Weights & Biases. What they are called and what they take of media.

Accelerate passes numbers on to all of them, pictures to some, and videos to none.
"""

import importlib.util
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..video_io import read_video, write_video


def check_trackers(trackers: Sequence[str]) -> None:
    """Refuse trackers that are not installed, which Accelerate would leave out silently."""
    for name in trackers:
        if importlib.util.find_spec(name) is None:
            raise ImportError(f'`trackers: [{name}]` needs {name}: pip install "diffusers-leanvae[{name}]"')


def log_media(accelerator: Accelerator, step: int, pictures: Mapping[str, Path], videos: Mapping[str, Path]) -> None:
    """Give the trackers of a run files to show; in the main process.

    Args:
        accelerator: That of the run, with its trackers.
        step: The step they belong to.
        pictures: Files of pictures, by name.
        videos: Files of videos in mp4, by name.
    """
    for tracker in accelerator.trackers:
        _LOGGERS[tracker.name](tracker.tracker, step, pictures, videos)


def _log_to_tensorboard(writer: Any, step: int, pictures: Mapping[str, Path], videos: Mapping[str, Path]) -> None:
    """TensorBoard shows videos as animated pictures; its own `add_video` needs one more package to make them."""
    import numpy as np
    from PIL import Image
    from tensorboard.compat.proto import summary_pb2

    proto: Any = summary_pb2  # made when it is imported: type checkers know no names in it
    for name, path in pictures.items():
        with Image.open(path) as picture:
            writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
    for name, path in videos.items():
        frames, info = read_video(path)
        with tempfile.TemporaryDirectory(prefix="leanvae-") as folder:
            animation = Path(folder, "video.gif")
            write_video(animation, frames, info.fps)
            data = animation.read_bytes()
        _, height, width, num_colors = frames.shape
        image = proto.Summary.Image(height=height, width=width, colorspace=num_colors, encoded_image_string=data)
        writer.file_writer.add_summary(proto.Summary(value=[proto.Summary.Value(tag=name, image=image)]), step)
    writer.flush()


def _log_to_trackio(run: Any, step: int, pictures: Mapping[str, Path], videos: Mapping[str, Path]) -> None:
    import trackio  # pyright: ignore[reportMissingImports]

    shown = {name: trackio.Image(str(path)) for name, path in pictures.items()}
    run.log(shown | {name: trackio.Video(str(path)) for name, path in videos.items()}, step=step)


def _log_to_wandb(run: Any, step: int, pictures: Mapping[str, Path], videos: Mapping[str, Path]) -> None:
    import wandb  # pyright: ignore[reportMissingImports]

    shown = {name: wandb.Image(str(path)) for name, path in pictures.items()}
    run.log(shown | {name: wandb.Video(str(path), format="mp4") for name, path in videos.items()}, step=step)


_LOGGERS: dict[str, Callable[[Any, int, Mapping[str, Path], Mapping[str, Path]], None]] = {
    "tensorboard": _log_to_tensorboard,
    "trackio": _log_to_trackio,
    "wandb": _log_to_wandb,
}
