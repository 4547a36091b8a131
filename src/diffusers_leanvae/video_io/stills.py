"""Pictures, animations and numbered pictures -> uint8 RGB frames, read by Pillow.

What a pixel is
- 8-bit RGB. More bits are rounded to 8, 65535 to 255. CMYK, LAB and YCbCr are converted.
- sRGB: an embedded ICC profile is applied, so that photos in a wide gamut look as in a browser. A profile that cannot
  be applied is left out. JPEG samples are those of libjpeg, which interpolates subsampled chroma.
- Upright: the orientation of EXIF, of the TIFF tag or of AVIF is applied.
- Opaque: transparency is composed over a background, in 8 bits, rounded.
- Of a TIFF with several pages, the first page is the picture.

Delays of animated GIF, WebP and APNG files of 10 ms or less count as 100 ms, as in browsers.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import struct
import sys
import threading
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fractions import Fraction
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self, cast

from ..checks import reason_of
from .containers import MAX_PIXELS, PathLike, VideoError, count_cores
from .delays import avif_delays, gif_delays, walk_png, webp_delays


if TYPE_CHECKING:  # these take a second to import, and a header can be read without them
    import numpy as np
    from PIL import Image

# What Pillow says of damaged files is in the errors; without this it comes on stderr as well if nobody set up logging.
logging.getLogger("PIL").addHandler(logging.NullHandler())

# Threads that read the pictures of a sequence; about the bytes of a pixel while a picture is read, the most, which a
# transparent one takes; and the bytes of all that are read together.
_MAX_THREADS, _BYTES_PER_PIXEL, _BYTES_AT_ONCE = 4, 35, 1 << 30

# Classes of Pillow, which are named here so that no other format is ever tried (PostScript would run a program).
_READERS = {
    "png": "PIL.PngImagePlugin.PngImageFile",
    "jpeg": "PIL.JpegImagePlugin.JpegImageFile",
    "gif": "PIL.GifImagePlugin.GifImageFile",
    "webp": "PIL.WebPImagePlugin.WebPImageFile",
    "tiff": "PIL.TiffImagePlugin.TiffImageFile",
    "avif": "PIL.AvifImagePlugin.AvifImageFile",
    "jpeg2000": "PIL.Jpeg2KImagePlugin.Jpeg2KImageFile",
    "bmp": "PIL.BmpImagePlugin.BmpImageFile",
    "ppm": "PIL.PpmImagePlugin.PpmImageFile",
    "qoi": "PIL.QoiImagePlugin.QoiImageFile",
    "sgi": "PIL.SgiImagePlugin.SgiImageFile",
    "pcx": "PIL.PcxImagePlugin.PcxImageFile",
    "heif": "pillow_heif.HeifImageFile",
    "tga": "PIL.TgaImagePlugin.TgaImageFile",
}
_PIXEL_FORMATS = {
    "1": "monob",
    "L": "gray",
    "LA": "ya8",
    "La": "ya8",
    "P": "pal8",
    "PA": "pal8",
    "RGB": "rgb24",
    "RGBX": "rgb24",
    "RGBA": "rgba",
    "RGBa": "rgba",
    "CMYK": "cmyk",
    "YCbCr": "yuv444p",
    "LAB": "lab",
    "I;16": "gray16le",
    "I;16L": "gray16le",
    "I;16N": "gray16le",
    "I;16B": "gray16be",
    "I": "gray16le",
    "F": "grayf32le",
}
SEQUENCE_FPS = Fraction(25)  # frames per second of pictures that make up a video
# Orientations of EXIF: degrees clockwise. The other ones mirror.
_CLOCKWISE = {3: 180, 6: 90, 8: 270}
# Of pixels with 16 bits Pillow keeps the high byte. Read with the bytes swapped, it keeps the low one.
_NATIVE = "L" if sys.byteorder == "little" else "B"
_SWAPPED = {"L": "B", "B": "L", "N": "B" if _NATIVE == "L" else "L"}


def can_read(path: PathLike) -> bool:
    """Tell by its first bytes whether a file is a picture or animation that `ImageFrames` reads."""
    return _find_format(Path(path)) is not None


class ImageFrames:
    """The frames of one picture, of one animation, or of a sequence of pictures; a context manager.

    Args:
        files: One file, or the pictures of a sequence in order.
        background: Colour that shows where a picture is transparent, RGB in `[0, 255]`.
        name: What messages call a single file; its path by default.

    Attributes:
        width: Pixels as displayed, after rotation.
        height: Pixels as displayed, after rotation.
        num_frames: How many frames there are.
        times: When each frame is shown, seconds from the first.
        duration: Seconds for which all frames are shown; `None` for a single picture.
        is_animated: Whether it is one file of several frames.
        codec: Name of the format, such as `"png"`.
        pixel_format: FFmpeg's name, where it has one, of the format of the stored pixels, such as `"rgb24"`.
        rotation: Degrees clockwise (0, 90, 180, 270) by which stored pixels are turned; already applied.

    Raises:
        VideoError: If the file is no picture, is damaged, or claims more than `MAX_PIXELS` pixels.
    """

    def __init__(
        self,
        files: PathLike | Sequence[PathLike],
        background: tuple[int, int, int] = (255, 255, 255),
        name: str | None = None,
    ) -> None:
        if isinstance(files, str | os.PathLike):
            self._files, is_sequence = [Path(files)], False
        else:
            self._files, is_sequence = [Path(file) for file in files], len(files) > 1
        if not self._files:
            raise VideoError("`files` must name at least one picture, got none.")
        if len(background) != 3 or not all(isinstance(value, int) and 0 <= value <= 255 for value in background):
            raise VideoError(f"`background` must be three whole numbers from 0 to 255, got {background!r}.")
        self._background = background
        self._name = str(self._files[0]) if name is None or is_sequence else name
        self._picture: _Picture | None = _Picture(self._files[0], self._name)
        first = self._picture
        self.width, self.height = first.width, first.height
        self.codec, self.pixel_format = first.codec, first.pixel_format
        self.rotation = first.rotation
        self.is_animated = not is_sequence and len(first.delays) > 1
        self.duration: Fraction | None = None
        if is_sequence:
            self.times = [number / SEQUENCE_FPS for number in range(len(self._files))]
            self.duration = len(self._files) / SEQUENCE_FPS
        elif self.is_animated:
            ends = [Fraction(0)]
            for delay in first.delays:
                ends.append(ends[-1] + delay)
            self.times, self.duration = ends[:-1], ends[-1]
        else:
            self.times = [Fraction(0)]
        self.num_frames = len(self.times)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._picture is not None:
            self._picture.close()
        self._picture = None

    def arrays_from(self, index: int, stop: int | None = None, num_at_once: int = 1) -> Iterator[np.ndarray]:
        """Read the frames from number `index` on, until before `stop`.

        Args:
            index: The first frame.
            stop: The frame after the last; all if `None`.
            num_at_once: Pictures of a sequence that may be in memory at once, for threads to decode them.

        Yields:
            RGB frames, uint8 in `[0, 255]`, shape `(height, width, 3)`, which must not be changed.

        Raises:
            VideoError: If a file is missing or damaged, or its size is not that of the first.
        """
        numbers = range(index, self.num_frames if stop is None else min(stop, self.num_frames))
        frames = map(self._read, numbers)
        num_at_once = min(num_at_once, max(1, _BYTES_AT_ONCE // (_BYTES_PER_PIXEL * self.width * self.height)))
        num_threads = min(num_at_once, _MAX_THREADS, count_cores())
        if len(self._files) > 1 and num_threads > 1:
            frames = self._read_by_threads(numbers, num_threads, num_at_once)
        for _ in numbers:
            if self._picture is None:
                raise VideoError(f"Cannot read {self._name!r}: the reader is closed.")
            yield next(frames)

    def _read_by_threads(self, numbers: range, num_threads: int, num_at_once: int) -> Iterator[np.ndarray]:
        """Read so many pictures of a sequence, then hand them out, and so on: Pillow decodes one in one thread.

        No thread works while the caller does: filters of warnings, which reading sets, belong to the process.
        """
        if numbers:  # the first one alone: what all have in common, such as a colour transform, is made once
            yield self._read(numbers[0])
        for start in range(1, len(numbers), num_at_once):
            with ThreadPoolExecutor(num_threads) as pool:
                waiting = deque(pool.submit(self._read, number) for number in numbers[start : start + num_at_once])
            while waiting:
                yield waiting.popleft().result()  # which is not kept: the caller has copied it before the next

    def _read(self, number: int) -> np.ndarray:
        if len(self._files) == 1 or number == 0:
            assert self._picture is not None
            return self._picture.read(number, self._background)
        with _Picture(self._files[number], str(self._files[number])) as picture:
            if (picture.width, picture.height) != (self.width, self.height):
                raise VideoError(
                    f"Cannot read {str(self._files[number])!r}: it has {picture.width}x{picture.height} pixels, "
                    f"expected {self.width}x{self.height} as in {str(self._files[0])!r}."
                )
            return picture.read(0, self._background)


class _Picture:
    """One file that is open: its header, and its frames when they are asked for."""

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.name = name
        with _named_errors(name):
            codec = _find_format(path, must_be_there=True)
            if codec is None:
                raise VideoError(f"Cannot read {name!r}: it is no picture of a known format.")
            self.codec = codec
            self.delays: list[Fraction] = []  # of an animation
            exif = None
            self._first = 0  # Pillow's number of the first frame
            _check_size(name, _stored_size(path, codec))
            if codec == "png":
                self.delays, exif, is_apart = walk_png(path)
                self._first = int(is_apart)
            self._reader = _import_reader(name, codec)
            self._file: IO[bytes] = path.open("rb")
            try:
                self._image: Image.Image = self._reader(self._file)
                _check_size(name, self._image.size)
                if exif is not None:
                    self._image.info["exif"] = exif
                self._describe()
            except BaseException:
                self._file.close()
                raise

    def _describe(self) -> None:
        image = self._image
        if self.codec == "gif":
            self.delays = gif_delays(self.path.read_bytes())
        elif self.codec == "webp":
            self.delays = webp_delays(self.path.read_bytes())
        elif self.codec == "avif":
            self.delays = avif_delays(self.path, image)
        count = getattr(image, "n_frames", 1) - self._first if len(self.delays) > 1 else 1
        self.delays = self.delays[:count]
        self.orientation = _orientation(image, self.codec)
        self.rotation = _CLOCKWISE.get(self.orientation, 0)
        self.size = image.size
        # Pillow turns the pixels of a TIFF by itself, and its size is that of the turned one.
        self.is_turned = self.codec == "tiff"
        self.width, self.height = self.size
        if self.orientation >= 5 and not self.is_turned:
            self.height, self.width = self.size
        self.pixel_format = _PIXEL_FORMATS.get(image.mode, image.mode.lower())
        raw_mode = _raw_mode(image)
        self.white = 65535
        if self.codec == "tiff":
            if raw_mode == "I;12":
                self.white = 4095
            if getattr(image, "tag_v2", {}).get(262) == 0:  # the tag that says whether zero is white
                self.white = -self.white
        if image.info.get("nclx_profile", {}).get("transfer_characteristics") in (16, 18):  # of HEIF
            raise VideoError(f"Cannot read {self.name!r}: pictures of high dynamic range in HEIF are not supported.")
        if image.mode == "F" or image.mode == "I" and self.codec != "ppm":
            raise VideoError(
                f"Cannot read {self.name!r}: its pixels are numbers of which none is white, expected 16 bits."
            )
        self.is_wide = _swapped_mode(image) is not None and len(self.delays) < 2
        if self.is_wide:
            name = {"RGB": "rgb48", "RGBX": "rgb48", "LA": "ya16", "RGBA": "rgba64"}[raw_mode.split(";")[0]]
            self.pixel_format = name + ("be" if raw_mode.endswith("B") else "le")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def read(self, number: int, background: tuple[int, int, int]) -> np.ndarray:
        """Read a frame, `(height, width, 3)`; it must not be changed."""

        with _named_errors(self.name):
            image = self._image
            wide: np.ndarray | None = None
            if len(self.delays) > 1:
                image.seek(number + self._first)
            elif self.is_wide:
                with self.path.open("rb") as high, self.path.open("rb") as low:
                    wide = _read_wide(self._reader(high), self._reader(low))
            if wide is None:
                image.load()
            if image.size != self.size:  # a frame of a GIF that lies outside of its screen
                image = image.crop((0, 0, *self.size))
            pixels = _compose(image, wide, self.white, background)
        if not self.is_turned:
            pixels = _upright(pixels, self.orientation)
        return pixels


# --- What a file is --------------------------------------------------------------------------------------------------


def _find_format(path: Path, must_be_there: bool = False) -> str | None:
    """Return the key of `_READERS` for a file, by its first bytes."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError:
        if must_be_there:
            raise
        return None
    signatures = {
        "png": b"\x89PNG\r\n\x1a\n",
        "jpeg": b"\xff\xd8\xff",
        "gif": b"GIF8[79]a",
        "webp": b"RIFF....WEBP",
        "tiff": rb"II\*\0|MM\0\*|II\+\0|MM\0\+",
        # Not Motion JPEG 2000, which begins in the same way.
        "jpeg2000": rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n....ftyp(?!mjp2)",
        "bmp": rb"BM.{12}[\x0c-\x7c]\0\0\0",
        "ppm": rb"P[1-6][\s#]",
        "qoi": b"qoif",
        "sgi": rb"\x01\xda[\0\1][\1\2]",
    }
    for name, signature in signatures.items():
        if re.match(signature, head, re.DOTALL):
            return None if name == "png" and _is_high_dynamic_range(path, rb"\0\0\0\x04cICP.(.)") else name
    if head[4:8] == b"ftyp":
        return _find_heif(path, head)
    suffix = path.suffix.lower()
    if suffix == ".pcx" and re.match(rb"\x0a[\x00-\x05]\x01", head):
        return "pcx"
    # A Targa file has no signature, but only few first bytes are legal.
    if suffix in (".tga", ".icb", ".vda", ".vst") and re.match(rb".[\0\1][\1\2\3\x09\x0a\x0b]", head, re.DOTALL):
        return "tga"
    return None


def _find_heif(path: Path, head: bytes) -> str | None:
    """Tell AVIF and HEIF pictures from other files of this kind."""
    length = int.from_bytes(head[:4], "big")
    brands = {head[8:12], *(head[start : start + 4] for start in range(16, min(length, len(head)) - 3, 4))}
    if not brands & {b"avif", b"avis"}:
        # FFmpeg would take the first of the tiles of which these consist for the picture.
        return "heif" if head[8:12] in (b"heic", b"heix", b"heim", b"heis", b"mif1") else None
    return None if _is_high_dynamic_range(path, rb"colrnclx..\0(.)") else "avif"


def _is_high_dynamic_range(path: Path, mark: bytes) -> bool:
    """Tell pictures that FFmpeg has to read, as they are mapped like videos, by the number after a mark: PQ or HLG."""
    with path.open("rb") as file:
        return bool({b"\x10", b"\x12"} & set(re.findall(mark, file.read(1 << 16), re.DOTALL)))


def _import_reader(name: str, codec: str) -> Any:
    module, _, reader = _READERS[codec].rpartition(".")
    try:
        return getattr(importlib.import_module(module), reader)
    except ImportError as error:
        raise VideoError(
            f'Cannot read {name!r}: pictures of this kind need pillow-heif: pip install "diffusers-leanvae[heif]".'
        ) from error


def _stored_size(path: Path, codec: str) -> tuple[int, int]:
    """Read the size from a header where Pillow would allocate for it before it can be asked; `(0, 0)` otherwise."""
    if codec not in ("webp", "avif"):
        return 0, 0
    with path.open("rb") as file:
        head = file.read(1 << 16)
    if codec == "webp":
        if head[12:16] == b"VP8X":
            return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
        return 0, 0  # at most 16384 x 16384
    sizes = [struct.unpack(">II", head[m.end() + 4 : m.end() + 12]) for m in re.finditer(b"ispe", head[:-12])]
    return max(sizes, key=lambda size: size[0] * size[1], default=(0, 0))


def _check_size(name: str, size: tuple[int, int]) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise VideoError(
            f"Cannot read {name!r}: its header claims {size[0]}x{size[1]} pixels, expected at most {MAX_PIXELS}."
        )


def _orientation(image: Image.Image, codec: str) -> int:
    """Return the orientation as EXIF numbers it, 1 for upright."""
    if codec == "png" and not {"exif", "Raw profile type exif", "XML:com.adobe.xmp"} & image.info.keys():
        return 1  # Pillow would decode the picture to look behind it, where `walk_png` has looked
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # whatever a broken EXIF block leads to, the picture may be good
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


class _QuietPillow:
    """Suppression of Pillow's warnings: of sizes, which are checked here, and of damage that it gets over.

    Filters of warnings belong to the process. So that threads do not restore each other's, the first that comes in
    sets them and the last that goes out restores them.
    """

    def __init__(self) -> None:
        self._lock, self._count = threading.Lock(), 0
        self._former = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if self._count == 0:
                self._former = warnings.catch_warnings()
                self._former.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\b")
            self._count += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._count -= 1
            if self._count == 0:
                self._former.__exit__(None, None, None)


_QUIET_PILLOW = _QuietPillow()


@contextmanager
def _named_errors(name: str) -> Iterator[None]:
    """Turn all that goes wrong into a `VideoError` that names the file."""
    try:
        with _QUIET_PILLOW:
            yield
    except VideoError:
        raise
    except FileNotFoundError as error:
        raise VideoError(f"Cannot read {name!r}: the file does not exist.") from error
    except (PermissionError, IsADirectoryError) as error:
        raise VideoError(f"Cannot read {name!r}: {error.strerror}.") from error
    except MemoryError as error:
        raise VideoError(f"Cannot read {name!r}: there is not enough memory for its pixels.") from error
    except Exception as error:  # damaged files lead Pillow to errors of every kind
        raise VideoError(f"Cannot read {name!r}: the picture is damaged or truncated ({reason_of(error)}).") from error


# --- Pixels ----------------------------------------------------------------------------------------------------------


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an orientation of EXIF: first a reflection in the diagonal, then mirroring."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _compose(image: Image.Image, wide: np.ndarray | None, white: int, background: tuple[int, int, int]) -> np.ndarray:
    """Turn a loaded picture into opaque RGB pixels in sRGB.

    Args:
        image: The picture.
        wide: Its pixels with 16 bits, `(height, width, channels)`, where Pillow has only 8 of them.
        white: The value of white in a grey picture of more than 8 bits; negative where it is black.
        background: Colour that shows where it is transparent.
    """
    import numpy as np
    from PIL import Image

    profile = image.info.get("icc_profile")
    if wide is None and image.mode.startswith("I"):
        wide = np.asarray(image)[..., None].astype(np.int64)
        wide = np.clip(wide, 0, abs(white)) * 65535 // abs(white)
        wide = wide if white > 0 else 65535 - wide
    alpha: np.ndarray | None = None
    if wide is not None:
        key = image.info.get("transparency")  # one value, or one of each channel, that is transparent
        if key is not None:
            alpha = np.where((wide == np.array(key)).all(axis=-1), 0, 255).astype(np.uint8)
        narrow = ((wide.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 is 255, and halves do not occur
        if narrow.shape[-1] % 2 == 0:
            alpha, narrow = narrow[..., -1], narrow[..., :-1]
        image = Image.fromarray(narrow[..., 0] if narrow.shape[-1] == 1 else np.ascontiguousarray(narrow))
    elif image.mode == "La":
        image = image.convert("LA")
    elif image.has_transparency_data and image.mode not in ("LA", "RGBA"):
        image = image.convert("RGBA")
    if image.mode in ("LA", "RGBA"):
        alpha = np.asarray(image.getchannel("A"))
        image = image.convert(image.mode[:-1])
    elif image.mode not in ("L", "RGB", "CMYK", "LAB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    pixels = np.asarray(_to_srgb(image, profile))
    if alpha is None or alpha.min() == 255:
        return pixels
    weight = alpha[..., None].astype(np.uint16)
    total = pixels * weight + np.array(background, np.uint16) * (255 - weight) + 128
    return ((total + (total >> 8)) >> 8).astype(np.uint8)  # division by 255, rounded


def _raw_mode(image: Image.Image) -> str:
    """Return how Pillow will unpack the pixels of an image that is not loaded yet."""
    modes = {args if isinstance(args := tile[3], str) else args and args[0] for tile in image.tile}  # pyright: ignore
    mode = modes.pop() if len(modes) == 1 else ""
    return mode if isinstance(mode, str) else ""


def _swapped_mode(image: Image.Image) -> str | None:
    """Return the mode that brings the low bytes of 16-bit colours, of which Pillow keeps the high ones."""
    mode = _raw_mode(image)
    if mode == "LA;16B":
        return "RGBA"  # four bytes per pixel: both of grey, both of alpha
    match = re.fullmatch("((?:RGB|RGBA|RGBX);16)([LBN])", mode)
    return match and match[1] + _SWAPPED[match[2]]


def _read_wide(high: Image.Image, low: Image.Image) -> np.ndarray:
    """Read all 16 bits of the colours of a picture that is opened twice."""
    import numpy as np

    mode = _swapped_mode(low)
    assert mode is not None
    low.tile = [  # pyright: ignore
        tile._replace(args=mode if isinstance(tile.args, str) else (mode, *tile.args[1:]))
        for tile in low.tile  # pyright: ignore
    ]
    low.load()
    lower = np.asarray(low).astype(np.uint16)
    if mode == "RGBA":
        return np.stack([lower[..., 0] << 8 | lower[..., 1], lower[..., 2] << 8 | lower[..., 3]], axis=-1)
    high.load()
    return np.asarray(high).astype(np.uint16) << 8 | lower


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert grey, RGB, CMYK or LAB pixels to RGB in sRGB, by the profile where it is for such pixels."""
    from PIL import Image

    transform = _find_transform(None if image.mode == "LAB" else profile or b"", image.mode)
    if transform is None:
        return image if image.mode == "RGB" else image.convert("RGB")
    return transform.apply(image, Image.new("RGB", image.size))


@lru_cache(64)
def _find_transform(profile: bytes | None, mode: str) -> Any:
    """Build the transform of pixels to sRGB by a profile, that of LAB without one.

    Returns:
        The transform, or `None` where it may be left out: the profile is empty, changes nothing, is for other pixels,
        or cannot be applied.
    """
    import numpy as np
    from PIL import Image, ImageCms

    if profile is None:
        return _build_transform(ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")), mode)
    if not profile:
        return None
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    lattice = np.stack(np.meshgrid(*[levels] * Image.getmodebands(mode)), axis=-1)
    sample = Image.frombytes(mode, (lattice[..., 0].size, 1), lattice.tobytes())
    try:
        opened = ImageCms.ImageCmsProfile(BytesIO(profile))
        if cast(Any, opened.profile).xcolor_space.strip() != {"L": "GRAY"}.get(mode, mode):
            return None
        transform = _build_transform(opened, mode)
        converted = transform.apply(sample, Image.new("RGB", sample.size))
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    if mode == "CMYK":
        return transform
    difference = np.asarray(converted).astype(int) - np.asarray(sample.convert("RGB")).astype(int)
    return transform if int(np.abs(difference).max()) > 1 else None


def _build_transform(profile: Any, mode: str) -> Any:
    from PIL import ImageCms

    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    # What a photograph is shown with: white stays white, and black stays black.
    intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
    return ImageCms.buildTransform(profile, srgb, mode, "RGB", intent, flags)
