"""Caller-owned state of a causal video stream: what its layers must remember between chunks."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from .tiling import Tile, check_layout


class _Slot:
    """What one layer remembered before a chunk, and what it remembers for the next."""

    def __init__(self, before: torch.Tensor | None) -> None:
        self.before = before
        self.after: torch.Tensor | None = None
        self.is_read = False  # and given away


class Chunk:
    """Description of the frames that layers get, and the place where they remember some for the next chunk.

    Layers read what was remembered *before* this chunk, and what they remember goes into a second place, which becomes
    the state of the stream when the whole chunk is done; from then on this object takes nothing more. So a layer that
    is computed again, as gradient checkpointing does during the backward pass, reads the very tensors that it read the
    first time, and changes nothing. Hooks that move the arguments of layers to a device copy whatever has a method
    `to`, and rebuild tuples and dictionaries; this object is none of these, and its copies are itself.

    Without gradients nothing is computed again, and what was remembered is given away for good when it is read: the
    old state and the new one are never in memory together.

    Attributes:
        is_open: Whether it still takes what layers remember.
        has_gradients: Whether the call that it belongs to has gradients. A checkpointing function may call a layer
            without them inside such a call, to call it once more later.
        is_watched: Whether somebody looks at what goes into layers and comes out of them: then none overwrites it.

    Args:
        is_first: Whether the frames start with the first frame of the video.
        is_last: Whether nothing follows; then nothing is remembered.
        cache: The stream, if there is one.
        has_gradients: See the attribute; `None` for what is the case now.
    """

    def __init__(
        self,
        is_first: bool = True,
        is_last: bool = True,
        cache: "TemporalCache | None" = None,
        has_gradients: bool | None = None,
    ) -> None:
        self.is_first = is_first
        self.is_last = is_last
        self.is_open = cache is not None and not is_last
        self.is_watched = False
        self._cache = cache
        self.has_gradients = torch.is_grad_enabled() if has_gradients is None else has_gradients
        self._slots: dict[str, _Slot] = {}
        if cache is not None:
            self._slots = {name: _Slot(tail) for name, tail in cache.tails.items()}
            if not self.has_gradients:
                cache.tails = {}

    def __copy__(self) -> "Chunk":
        return self

    def __deepcopy__(self, memo: dict) -> "Chunk":
        return self

    def recall(
        self, name: str, like: torch.Tensor, time_dim: int = 2, is_optional: bool = False
    ) -> torch.Tensor | None:
        """The frames remembered under a name; `None` in a first chunk, or always if optional.

        Args:
            name: Given to [`remember`].
            like: What the frames precede: of the same shape but for time. They come back in its dtype, another one if
                the model was cast on the way.
            time_dim: The dimension of time.
            is_optional: Whether a later chunk may find nothing.

        Raises:
            ValueError: If a later chunk finds nothing, or frames of another shape.
        """
        if self._cache is None:
            return None
        self._check_gradients()
        slot = self._slots.get(name)
        tail = None if slot is None else slot.before
        if slot is None or tail is None:
            if not self.is_first and not is_optional:
                raise ValueError(_OTHER_MODEL if slot is None or not slot.is_read else _TWICE)
            return None
        if not self.has_gradients:
            slot.before, slot.is_read = None, True
        if tail.shape[:time_dim] + tail.shape[time_dim + 1 :] != like.shape[:time_dim] + like.shape[time_dim + 1 :]:
            raise ValueError(
                f"`cache` must be used with chunks of one shape, got {tuple(like.shape)} after {tuple(tail.shape)} "
                f"(time is dimension {time_dim})."
            )
        return tail.to(like.dtype)

    def remember(self, name: str, frames: torch.Tensor, copy: bool = True) -> None:
        """Keep frames for the next chunk, if there is one.

        Args:
            name: What [`recall`] finds them under.
            frames: The frames.
            copy: Whether to copy them: a view would keep all that it is a view of in memory, and see it overwritten.
        """
        if self.is_open:
            self._check_gradients()
            slot = self._slots.get(name)
            if slot is None:
                slot = self._slots[name] = _Slot(None)
            slot.after = frames.clone() if copy else frames

    @contextmanager
    def tile(self, tile: Tile) -> Iterator["Chunk"]:
        """This chunk for the layers of one spatial tile, which have a state of their own."""
        if self._cache is None:
            yield Chunk(self.is_first, self.is_last)
            return
        with self._cache.tile(tile) as state:
            chunk = Chunk(self.is_first, self.is_last, state)
            yield chunk
            chunk.close()

    def close(self) -> None:
        """Make what was remembered the state of the stream; what no layer asked for stays."""
        if self._cache is not None:
            tails = {name: slot.before if slot.after is None else slot.after for name, slot in self._slots.items()}
            self._cache.tails = {} if self.is_last else {k: tail for k, tail in tails.items() if tail is not None}
            if not self.has_gradients:
                self._slots = {}  # nobody reads them again, and the state may be on its way to disk
        self.is_open = False

    def _check_gradients(self) -> None:
        if self.has_gradients and not torch.is_grad_enabled():
            raise ValueError(
                "`use_reentrant` must be False for gradient checkpointing of streams and chunks of time, got a layer "
                "called without gradients inside a call with them."
            )


_OTHER_MODEL = "`cache` must be used with one model for a whole stream, got a stream of another one."
_TWICE = (
    "`cache` must be used with layers that are called once per chunk where gradients are off, got one called twice."
)
# A whole video: nothing precedes it, nothing follows. It is of layers that are called by themselves, which leave their
# input alone; whether this file was first imported where gradients are off must not decide that.
WHOLE = Chunk(has_gradients=True)


class TemporalCache:
    """State of one stream in one direction: what every causal layer must remember between chunks.

    Pass a fresh `TemporalCache()` with the first chunk and the same object with every later chunk; the model writes
    nothing anywhere else, so streams interleave freely and the memory is freed with the object. With spatial tiling
    each tile has a cache of its own inside. A stream keeps the tiling that it started with, whatever the model's
    settings become.

    Attributes:
        tails: Per layer name, the frames that it remembers; for LeanVAE's convolutions tensors of shape
            `(batch_size, 2, latent_height, latent_width, channels)`.
        tiles: Per tile name, the cache of that tile.
        num_latent_frames: Latent frames seen so far; 0 means that the next chunk starts with the image token.
        layout: Tile height, tile width and frames per chunk of this stream, `None` before it starts or without tiles.
        is_last: Set by the caller: the next chunk is the last of the stream, and nothing of it must be remembered.

    Args:
        directory: An existing folder: keep the caches of tiles on disk there while other tiles are computed, and only
            one in memory. For streams of large videos: the state of a 2160p stream takes several GB. The file has no
            name, so that nothing can be left behind. Not for gradients.
        layout: Tiles of this stream, instead of what the model's settings say.
    """

    def __init__(self, directory: str | Path | None = None, layout: tuple[int, int, int] | None = None) -> None:
        if directory is not None and not Path(directory).is_dir():
            raise ValueError(f"`directory` must be an existing folder, got {str(directory)!r}.")
        if layout is not None:
            check_layout("layout", layout)
        self.directory = None if directory is None else Path(directory)
        self._given_layout = self.layout = layout
        self._parking: _ParkingFile | None = None
        self.tails: dict[str, torch.Tensor] = {}
        self.tiles: dict[str, TemporalCache] = {}
        self.num_latent_frames = 0
        self.is_last = False
        self._is_broken = False

    @contextmanager
    def step(self, num_latent_frames: int) -> Iterator[None]:
        """Around one call of the model: as many latent frames of the stream.

        A call that failed half-way has advanced some layers and not others: the stream takes no further chunk.
        """
        if self._is_broken:
            raise ValueError("`cache` must belong to a stream without failed chunks, got one; call `cache.reset()`.")
        self._is_broken = True
        yield
        self.num_latent_frames += num_latent_frames
        self._is_broken = False

    @contextmanager
    def tile(self, tile: Tile) -> Iterator["TemporalCache"]:
        """The cache of one tile, made at its first use; with a `directory` it is in memory inside the context only."""
        name = tile.name
        if name not in self.tiles:
            # What is missing in mid-stream was remembered elsewhere: zeros in its place would be silently wrong.
            if self.num_latent_frames > 0:
                raise ValueError(_OTHER_MODEL)
            self.tiles[name] = TemporalCache()
        elif self._parking is not None and not self.tiles[name].tails:
            self.tiles[name].tails = self._parking.load(name)
        yield self.tiles[name]
        self._park(name)

    def _park(self, name: str) -> None:
        if self.directory is not None:
            self._parking = self._parking or _ParkingFile(self.directory)
            self._parking.save(name, self.tiles[name].tails)
            self.tiles[name].tails = {}

    def reset(self) -> None:
        """Forget the stream; the next chunk is the first of a new one."""
        self.__init__(self.directory, self._given_layout)

    def copy(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "TemporalCache":
        """A second stream that continues from here, in memory, its tensors moved and cast if asked for.

        Args:
            device: Where to move the tensors; by default they stay where they are.
            dtype: What to cast them to; by default they keep their dtype.
        """
        other = TemporalCache(layout=self.layout)
        other.tails = {key: _copied(tail, device, dtype) for key, tail in self.tails.items()}
        for name in self.tiles:
            other.tiles[name] = TemporalCache()
            other.tiles[name].tails = {key: _copied(t, device, dtype) for key, t in self._tails_of(name).items()}
        other.num_latent_frames, other._is_broken = self.num_latent_frames, self._is_broken
        return other

    def _tails_of(self, name: str) -> dict[str, torch.Tensor]:
        tails = self.tiles[name].tails
        return tails if tails or self._parking is None else self._parking.load(name)

    def nbytes(self) -> int:
        """Memory held, in bytes; what is on disk does not count."""
        caches = (self, *self.tiles.values())
        return sum(tail.nbytes for cache in caches for tail in cache.tails.values())

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything needed to continue the stream later, as tensors (safetensors can store it)."""
        if self._is_broken:
            raise ValueError("`state_dict` must be taken between chunks, got a stream whose last chunk failed.")
        state = dict(self.tails)
        for tile in self.tiles:
            state |= {f"{tile}/{name}": tail for name, tail in self._tails_of(tile).items()}
        if self.layout is not None:
            state["layout"] = torch.tensor(self.layout)
        return state | {"num_latent_frames": torch.tensor(self.num_latent_frames)}

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Restore what [`TemporalCache.state_dict`] gave."""
        self.reset()
        tensors = dict(state_dict)
        self.num_latent_frames = int(tensors.pop("num_latent_frames", 0))
        layout = tensors.pop("layout", None)
        self.layout = None if layout is None else tuple(layout.tolist())
        for key, tensor in tensors.items():
            tile, slash, name = key.rpartition("/")
            cache = self.tiles.setdefault(tile, TemporalCache()) if slash else self
            cache.tails[name] = tensor
        for name in self.tiles:
            self._park(name)


def chunks(
    cache: TemporalCache | None, bounds: Sequence[tuple[int, int]], is_first: bool, is_last: bool
) -> Iterator[tuple[int, int, Chunk]]:
    """The chunks of a video, or of one call of a stream, with their bounds; each is done when the next is asked for.

    Args:
        cache: The stream. Without one a passing one serves if there are several chunks.
        bounds: Where the chunks start and stop.
        is_first: Whether the first one starts with the first frame of the video.
        is_last: Whether nothing follows the last one. What is not remembered takes no memory: of a large tile it would
            be more than its activations.
    """
    if cache is None and len(bounds) > 1:
        cache = TemporalCache()
    for start, stop in bounds:
        chunk = Chunk(is_first and start == 0, is_last and stop == bounds[-1][1], cache)
        yield start, stop, chunk
        chunk.close()


def _copied(tail: torch.Tensor, device: torch.device | str | None, dtype: torch.dtype | None) -> torch.Tensor:
    return tail.to(device=device, dtype=dtype, copy=True)


class _Place(NamedTuple):
    """Place of a tile's tensors in a parking file; `tails` are like them, without data."""

    offset: int
    capacity: int
    tails: dict[str, torch.Tensor]


class _ParkingFile:
    """Tensors of tiles in an unnamed temporary file: it vanishes with its owner, be that by SIGKILL."""

    def __init__(self, directory: Path):
        self.file = tempfile.TemporaryFile(dir=directory)
        self.size = 0
        self.places: dict[str, _Place] = {}

    def save(self, tile: str, tails: dict[str, torch.Tensor]) -> None:
        if any(tail.requires_grad for tail in tails.values()):
            raise ValueError("`directory` must be `None` where gradients are computed: a file keeps numbers only.")
        # A tile is written over its last state, or at the end once it has outgrown that.
        num_bytes = sum(tail.nbytes for tail in tails.values())
        place = self.places.get(tile)
        if place is None or place.capacity < num_bytes:
            place = _Place(self.size, num_bytes, {})
            self.size += num_bytes
        # `expand` makes one number look like the tensor: its shape, dtype and device are kept, and nothing else.
        likes = {name: tail.new_empty(()).expand(tail.shape) for name, tail in tails.items()}
        self.places[tile] = place._replace(tails=likes)
        self.file.seek(place.offset)
        for tail in tails.values():
            self.file.write(tail.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)

    def load(self, tile: str) -> dict[str, torch.Tensor]:
        place = self.places[tile]
        self.file.seek(place.offset)
        return {name: self._read(like) for name, like in place.tails.items()}

    def _read(self, like: torch.Tensor) -> torch.Tensor:
        # Read, not mapped: pages of a mapped file would stay in memory next to the tensors that replace them.
        data = torch.empty(like.numel() * like.itemsize, dtype=torch.uint8)
        if self.file.readinto(data.numpy().data) != data.numel():  # type: ignore[attr-defined]
            raise OSError("The file of a parked stream ends early; was its disk full?")
        return data.view(like.dtype).view(like.shape).to(like.device)
