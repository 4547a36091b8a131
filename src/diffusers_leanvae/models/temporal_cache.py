"""Caller-owned state of a causal video stream: what each temporal convolution must remember between chunks."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from .tiling import Span


class TemporalCache:
    r"""The last two input time steps of every causal convolution, for one stream and one direction.

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
            name, so that nothing can be left behind.
        layout: Tiles of this stream, instead of what the model's settings say.
    """

    def __init__(self, directory: str | Path | None = None, layout: tuple[int, int, int] | None = None) -> None:
        if directory is not None and not Path(directory).is_dir():
            raise ValueError(f"`directory` must be an existing folder, got {str(directory)!r}.")
        self.directory = None if directory is None else Path(directory)
        self._given_layout = self.layout = layout
        self._parking: _ParkingFile | None = None
        self.tails: dict[str, torch.Tensor] = {}
        self.tiles: dict[str, TemporalCache] = {}
        self.num_latent_frames = 0
        self.is_last = False
        self._is_broken = False

    @contextmanager
    def step(self, num_latent_frames: int) -> Iterator[bool]:
        r"""Around the computation of one chunk; yields whether it is the first.

        A chunk that failed half-way has advanced some convolutions and not others: the stream refuses to go on.
        """
        if self._is_broken:
            raise ValueError("`cache` must belong to a stream without failed chunks, got one; call `cache.reset()`.")
        self._is_broken = True
        yield self.num_latent_frames == 0
        self.num_latent_frames += num_latent_frames
        self._is_broken = False

    def exchange(self, name: str, hidden_states: torch.Tensor, num_steps: int) -> torch.Tensor:
        r"""The remembered steps that precede `hidden_states` (zeros at the start); remembers its last ones instead."""
        tail = self.tails.get(name)
        if tail is None:
            self._check_unstarted()
            shape = hidden_states.shape
            tail = hidden_states.new_zeros(()).expand(shape[0], num_steps, *shape[2:])  # no memory of its own
        if tail.shape[0] != hidden_states.shape[0] or tail.shape[2:] != hidden_states.shape[2:]:
            raise ValueError(
                f"`cache` must be used with chunks of one shape, got tokens {tuple(hidden_states.shape)} after "
                f"{tuple(tail.shape)} (batch, time, height, width, channels)."
            )
        if self.is_last:
            self.tails.pop(name, None)
            return tail
        # A copy, not a view: a view would keep the whole chunk's activation alive, and see it overwritten.
        last = hidden_states[:, -num_steps:]
        short = num_steps - last.shape[1]
        self.tails[name] = torch.cat((tail[:, -short:], last), dim=1) if short else last.clone()
        return tail

    def recall(self, name: str, like: torch.Tensor, is_optional: bool = False) -> torch.Tensor | None:
        r"""The frames remembered under a name, channels-first; `None` at the start, or always if optional.

        Args:
            name: Given to [`remember`].
            like: What the frames precede, `(batch_size, channels, time, height, width)`.
            is_optional: Whether a stream may have none.
        """
        tail = self.tails.get(name)
        if tail is None:
            if not is_optional:
                self._check_unstarted()
        elif tail.shape[:2] != like.shape[:2] or tail.shape[3:] != like.shape[3:]:
            raise ValueError(
                f"`cache` must be used with chunks of one shape, got {tuple(like.shape)} after {tuple(tail.shape)} "
                "(batch, channels, time, height, width)."
            )
        return tail

    def remember(self, name: str, frames: torch.Tensor) -> None:
        r"""Keep a copy of frames for the next chunk, if there is one."""
        if self.is_last:
            self.tails.pop(name, None)
        else:
            self.tails[name] = frames.clone()

    def tile(self, name: str) -> "TemporalCache":
        r"""The cache of one spatial tile, made at its first use."""
        if name not in self.tiles:
            self._check_unstarted()
            self.tiles[name] = TemporalCache()
        elif self._parking is not None and not self.tiles[name].tails:
            self.tiles[name].tails = self._parking.load(name)
        return self.tiles[name]

    def _check_unstarted(self) -> None:
        # What is missing in mid-stream was remembered elsewhere: zeros in its place would be silently wrong.
        if self.num_latent_frames > 0:
            raise ValueError("`cache` must be used with one model for a whole stream, got a stream of another one.")

    def park(self, name: str) -> None:
        r"""Move the cache of a tile to `directory`, if there is one, until [`tile`] asks for it."""
        if self.directory is not None:
            self._parking = self._parking or _ParkingFile(self.directory)
            self._parking.save(name, self.tiles[name].tails)
            self.tiles[name].tails = {}

    def reset(self) -> None:
        r"""Forget the stream; the next chunk is the first of a new one."""
        self.__init__(self.directory, self._given_layout)

    def to(self, *args, **kwargs) -> "TemporalCache":
        r"""A copy, in memory, with its tensors moved or cast as by `torch.Tensor.to`."""
        moved = TemporalCache(layout=self.layout)
        moved.tails = {name: tail.to(*args, **kwargs) for name, tail in self.tails.items()}
        for name in self.tiles:
            moved.tiles[name] = TemporalCache()
            moved.tiles[name].tails = {key: tail.to(*args, **kwargs) for key, tail in self._tails_of(name).items()}
            moved.tiles[name].num_latent_frames = self.num_latent_frames
        moved.num_latent_frames, moved._is_broken = self.num_latent_frames, self._is_broken
        return moved

    def _tails_of(self, name: str) -> dict[str, torch.Tensor]:
        tails = self.tiles[name].tails
        return tails if tails or self._parking is None else self._parking.load(name)

    def nbytes(self) -> int:
        r"""Memory held, in bytes; what is on disk does not count."""
        caches = (self, *self.tiles.values())
        return sum(tail.nbytes for cache in caches for tail in cache.tails.values())

    def state_dict(self) -> dict[str, torch.Tensor]:
        r"""Everything needed to continue the stream later, as tensors (safetensors can store it)."""
        if self._is_broken:
            raise ValueError("`state_dict` must be taken between chunks, got a stream whose last chunk failed.")
        state = dict(self.tails)
        for tile in self.tiles:
            state |= {f"{tile}/{name}": tail for name, tail in self._tails_of(tile).items()}
        if self.layout is not None:
            state["layout"] = torch.tensor(self.layout)
        return state | {"num_latent_frames": torch.tensor(self.num_latent_frames)}

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        r"""Restore what [`TemporalCache.state_dict`] gave."""
        self.reset()
        tensors = dict(state_dict)
        count = int(tensors.pop("num_latent_frames", 0))
        layout = tensors.pop("layout", None)
        self.layout = None if layout is None else tuple(layout.tolist())
        for key, tensor in tensors.items():
            tile, slash, name = key.rpartition("/")
            cache = self.tile(tile) if slash else self
            cache.tails[name] = tensor
            cache.num_latent_frames = count
        self.num_latent_frames = count
        for name in self.tiles:
            self.park(name)


class _ParkingFile:
    r"""Tensors of tiles in an unnamed temporary file: it vanishes with its owner, be that by SIGKILL."""

    def __init__(self, directory: Path):
        self.file = tempfile.TemporaryFile(dir=directory)
        self.size = 0
        self.places: dict[str, tuple[int, dict[str, torch.Tensor]]] = {}  # offset, and tensors without data per name

    def save(self, tile: str, tails: dict[str, torch.Tensor]) -> None:
        # The tensors of a tile keep their sizes, so it is written over its last state.
        offset = self.places[tile][0] if tile in self.places else self.size
        # `expand` makes one number look like the tensor: its shape, dtype and device are kept, and nothing else.
        self.places[tile] = (offset, {name: tail.new_empty(()).expand(tail.shape) for name, tail in tails.items()})
        self.file.seek(offset)
        for tail in tails.values():
            self.file.write(tail.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        self.size = max(self.size, self.file.tell())

    def load(self, tile: str) -> dict[str, torch.Tensor]:
        offset, tails = self.places[tile]
        self.file.seek(offset)
        return {name: self._read(like) for name, like in tails.items()}

    def _read(self, like: torch.Tensor) -> torch.Tensor:
        # Read, not mapped: pages of a mapped file would stay beside the tensors that replace them.
        data = torch.empty(like.numel() * like.itemsize, dtype=torch.uint8)
        if self.file.readinto(data.numpy().data) != data.numel():  # type: ignore[attr-defined]
            raise OSError("The file of a parked stream ends early; was its disk full?")
        return data.view(like.dtype).view(like.shape).to(like.device)


@contextmanager
def tile_cache(cache: TemporalCache | None, rows: Span, columns: Span, needed: bool) -> Iterator[TemporalCache | None]:
    r"""The state of one tile of a stream; without a stream a passing one, or none if the tile is one chunk."""
    if cache is None:
        yield TemporalCache() if needed else None
        return
    name = f"{rows.start}.{columns.start}"
    yield cache.tile(name)
    if cache.is_last:
        cache.tiles[name].tails = {}
    else:
        cache.park(name)


@contextmanager
def tile_chunk(cache: TemporalCache | None, rows: Span, columns: Span) -> Iterator[TemporalCache | None]:
    r"""The state of one tile during one chunk, where all tiles of a chunk are computed before the next."""
    if cache is None:
        yield None
        return
    name = f"{rows.start}.{columns.start}"
    state = cache.tile(name)
    state.is_last = cache.is_last
    yield state
    cache.park(name)


def mark_last(state: TemporalCache | None, cache: TemporalCache | None, is_end: bool) -> None:
    r"""Tell the state of a tile that nothing follows: at the end of the last chunk of a stream, or of a whole video.

    What is not remembered takes no memory: of a large tile it would be more than its activations.
    """
    if state is not None:
        state.is_last = is_end and (cache is None or cache.is_last)
