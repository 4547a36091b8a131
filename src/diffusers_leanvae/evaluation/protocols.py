"""Evaluation protocols: every choice that a figure depends on, under one name or in a YAML file."""

from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self

from ..checks import check_choice, reason_of
from .features import VideoFeatures
from .measures import KINDS


LAYOUTS = ("videos", "frames")
STARTS = ("first", "random")
RESAMPLINGS = ("bicubic", "lanczos")


@dataclass(frozen=True)
class Protocol:
    """Which frames of which videos are taken, at what size, and what is measured on them.

    Attributes:
        name: Named in results.
        num_frames: Frames of a clip; `None` for whole videos, of which models that need `4 * n + 1` frames leave out
            the last ones.
        resolution: Height and width of the clips.
        layout: `"videos"`: every video or image file below the folder is a clip. `"frames"`: every folder of pictures
            below it is one, as in DAVIS.
        start: `"first"` takes the first frames, `"random"` starts anywhere, drawn from `seed` and the clip's name.
        stride: Distance of the frames that are taken; 1 for all.
        min_frames: Shorter videos are left out and counted; `None` for those without enough frames.
        max_clips: Take so many files at most, the first by name.
        resampling: `"bicubic"`: the short side is resized to `resolution` with antialiasing, in floating point, then
            the centre is cut out. `"lanczos"`: the largest square in the centre is cut out and resized in 8 bits by
            Pillow, as StyleGAN-V does.
        jpeg_quality: Quality, 1 to 100, of JPEG that frames go through, as in StyleGAN-V's data sets; `None` for none.
        num_feature_frames: First frames of a clip that features (FVD) see.
        metrics: Kinds of metrics, in order.
        seed: Of the random starts.

    Raises:
        ValueError: If a value is not legal.
    """

    name: str
    num_frames: int | None = 17
    resolution: int = 256
    layout: Literal["videos", "frames"] = "videos"
    start: Literal["first", "random"] = "first"
    stride: int = 1
    min_frames: int | None = None
    max_clips: int | None = None
    resampling: Literal["bicubic", "lanczos"] = "bicubic"
    jpeg_quality: int | None = None
    num_feature_frames: int = 16
    metrics: tuple[str, ...] = ("psnr", "psnr_in_group", "ssim", "flicker", "grid", "ghost")
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "metrics", tuple(self.metrics))
        for name, smallest in (("resolution", 8), ("stride", 1), ("num_feature_frames", 1), ("seed", 0)):
            self._check_number(name, smallest)
        for name, largest in (("num_frames", None), ("min_frames", None), ("max_clips", None), ("jpeg_quality", 100)):
            if getattr(self, name) is not None:
                self._check_number(name, 1, largest)
        for name, legal in (("layout", LAYOUTS), ("start", STARTS), ("resampling", RESAMPLINGS)):
            check_choice(name, getattr(self, name), legal)
        for kind in self.metrics:
            check_choice("metrics", kind, KINDS)
        if self.num_frames is None and (self.start != "first" or self.stride != 1):
            raise ValueError("`num_frames` must be a number where `start` is 'random' or `stride` is not 1, got null.")

    def _check_number(self, name: str, smallest: int, largest: int | None = None) -> None:
        value = getattr(self, name)
        is_number = isinstance(value, int) and not isinstance(value, bool)
        if not is_number or value < smallest or (largest is not None and value > largest):
            legal = f"of at least {smallest}" if largest is None else f"from {smallest} to {largest}"
            raise ValueError(f"`{name}` must be a whole number {legal}, got {value!r}.")

    @property
    def span(self) -> int:
        """Frames of a video that a clip covers, or that a video must have if that is more."""
        covered = 1 if self.num_frames is None else (self.num_frames - 1) * self.stride + 1
        return max(covered, self.min_frames or 1)

    def check_features(self, features: VideoFeatures) -> None:
        """Refuse features that do not get the frames that they take.

        Raises:
            ValueError: If `num_feature_frames` is not legal for them, or more than a clip has.
        """
        is_short = self.num_frames is not None and self.num_frames < self.num_feature_frames
        if is_short or features.num_frames not in (None, self.num_feature_frames):
            legal = f"at most {self.num_frames}" if is_short else features.num_frames
            raise ValueError(
                f"`num_feature_frames` must be {legal} for {features.name}, got {self.num_feature_frames} in the "
                "protocol."
            )

    def to_json(self) -> dict[str, Any]:
        """Lay out every choice for a file."""
        return asdict(self) | {"metrics": list(self.metrics)}

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read a protocol of one's own: a mapping of the attributes above; `name` is the file's by default.

        Raises:
            ValueError: If it cannot be read, or a key or value is not legal; the message names it.
        """
        import yaml

        path = Path(path)
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(
                f"`protocol` must be a readable YAML file, got {str(path)!r}: {reason_of(error)}."
            ) from error
        if not isinstance(values, dict):
            raise ValueError(f"`protocol` must be a YAML file of keys and values, got {values!r} in {str(path)!r}.")
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                near = get_close_matches(str(key), known, 1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise ValueError(
                    f"`protocol` must have keys of {', '.join(known)}, got {key!r}{hint} in {str(path)!r}."
                )
        if not isinstance(values.get("metrics", []), list):
            raise ValueError(f"`metrics` must be a list, got {values['metrics']!r} in {str(path)!r}.")
        try:
            options: dict[str, Any] = {"name": path.stem, **values}
            return cls(**options)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{reason_of(error)}, in {str(path)!r}.") from error


_PAPER = ("psnr", "psnr_in_group", "ssim", "ms_ssim", "lpips_vgg16", "lpips_alexnet", "rfvd_i3d", "flicker", "warp")
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("val-17x256"),
        Protocol("davis-17x256", layout="frames", metrics=_PAPER),
        Protocol("ucf101-17x256", metrics=_PAPER),
        # The real side of FVD as Latte reports it; generated videos give their first frames, one after another.
        Protocol(
            "fvd2048_16f",
            num_frames=16,
            start="random",
            stride=3,
            min_frames=48,
            max_clips=2048,
            resampling="lanczos",
            jpeg_quality=75,
            metrics=("rfvd_i3d",),
        ),
    )
}


def get_protocol(name: str | Path) -> Protocol:
    """Return a protocol by its name, or read one from a YAML file.

    Raises:
        ValueError: If there is none of this name.
    """
    if str(name) in PROTOCOLS:
        return PROTOCOLS[str(name)]
    if Path(name).suffix.lower() in (".yaml", ".yml"):
        return Protocol.from_yaml(name)
    raise ValueError(f"`protocol` must be one of {', '.join(PROTOCOLS)}, or a .yaml file, got {str(name)!r}.")


def with_sizes(protocol: Protocol, num_frames: int | None, resolution: int | None) -> Protocol:
    """Change sizes of a protocol, which is then called after them; `None` keeps one."""
    changed = replace(
        protocol, num_frames=num_frames or protocol.num_frames, resolution=resolution or protocol.resolution
    )
    if changed == protocol:
        return protocol
    return replace(changed, name=f"{protocol.name} at {changed.num_frames}x{changed.resolution}")


def first_frames(protocol: Protocol) -> Protocol:
    """Return the protocol for generated videos: their first frames, one after another, of any length that suffices."""
    return replace(protocol, start="first", stride=1, min_frames=None)
