"""Caller-owned state of a causal video stream: what each temporal convolution must remember between chunks."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .tiling import Span


class TemporalCache:
    r"""The last two input time steps of every causal convolution, for one stream and one direction.

    Pass a fresh `TemporalCache()` with the first chunk and the same object with every later chunk; the model writes
    nothing anywhere else, so streams interleave freely and the memory is freed with the object. With spatial tiling
    each tile has a cache of its own inside.

    Attributes:
        tails: Per convolution name, a tensor of shape `(batch_size, 2, latent_height, latent_width, channels)`.
        tiles: Per tile name, the cache of that tile.
        num_latent_frames: Latent frames seen so far; 0 means that the next chunk starts with the image token.
        layout: Tile height, tile width and frames per chunk that a memory budget chose for this stream.

    Args:
        directory: Keep the caches of tiles there while other tiles are computed, and only one in memory. For streams
            of large videos: the state of a 2160p stream takes several GB.
    """

    def __init__(self, directory: str | Path | None = None) -> None:
        self.directory = None if directory is None else Path(directory)
        self.layout: tuple[int, int, int] | None = None
        self.tails: dict[str, torch.Tensor] = {}
        self.tiles: dict[str, TemporalCache] = {}
        self.num_latent_frames = 0
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
            tail = hidden_states.new_zeros(hidden_states.shape[0], num_steps, *hidden_states.shape[2:])
        if tail.shape[0] != hidden_states.shape[0] or tail.shape[2:] != hidden_states.shape[2:]:
            raise ValueError(
                f"`cache` must be used with chunks of one shape, got tokens {tuple(hidden_states.shape)} after "
                f"{tuple(tail.shape)} (batch, time, height, width, channels)."
            )
        # A copy, not a view: a view would keep the whole chunk's activation alive, and see it overwritten.
        last = hidden_states[:, -num_steps:]
        short = num_steps - last.shape[1]
        self.tails[name] = torch.cat((tail[:, -short:], last), dim=1) if short else last.clone()
        return tail

    def tile(self, name: str) -> "TemporalCache":
        r"""The cache of one spatial tile, made at its first use."""
        if name not in self.tiles:
            self._check_unstarted()
            self.tiles[name] = TemporalCache()
        elif self.directory is not None:
            self.tiles[name].tails = load_file(self._parked(name))
        return self.tiles[name]

    def _check_unstarted(self) -> None:
        # What is missing in mid-stream was remembered elsewhere: zeros in its place would be silently wrong.
        if self.num_latent_frames > 0:
            raise ValueError(
                "`cache` must be used with one model and the same tiling for a whole stream, got a stream that "
                "started differently."
            )

    def park(self, name: str) -> None:
        r"""Move the cache of a tile to `directory`, if there is one, until [`tile`] asks for it."""
        if self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            save_file(self.tiles[name].tails, self._parked(name))
            self.tiles[name].tails = {}

    def _parked(self, name: str) -> Path:
        assert self.directory is not None
        return self.directory / f"{name}.safetensors"

    def reset(self) -> None:
        r"""Forget the stream; the next chunk is the first of a new one."""
        if self.directory is not None:
            for name in self.tiles:
                self._parked(name).unlink(missing_ok=True)
        self.__init__(self.directory)

    def to(self, *args, **kwargs) -> "TemporalCache":
        r"""A copy with its tensors moved or cast as by `torch.Tensor.to`."""
        moved = TemporalCache()
        moved.tails = {name: tail.to(*args, **kwargs) for name, tail in self.tails.items()}
        moved.tiles = {name: tile.to(*args, **kwargs) for name, tile in self.tiles.items()}
        moved.num_latent_frames, moved._is_broken = self.num_latent_frames, self._is_broken
        return moved

    def nbytes(self) -> int:
        r"""Memory held, in bytes."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def _tensors(self) -> dict[str, torch.Tensor]:
        nested = {
            f"{name}/{key}": value for name, tile in self.tiles.items() for key, value in tile._tensors().items()
        }
        return self.tails | nested

    def state_dict(self) -> dict[str, torch.Tensor]:
        r"""Everything needed to continue the stream later, as tensors (safetensors can store it)."""
        if self._is_broken:
            raise ValueError("`state_dict` must be taken between chunks, got a stream whose last chunk failed.")
        parked = {}
        if self.directory is not None:
            for name in self.tiles:
                parked |= {f"{name}/{key}": tail for key, tail in load_file(self._parked(name)).items()}
        return self._tensors() | parked | {"num_latent_frames": torch.tensor(self.num_latent_frames)}

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        r"""Restore what [`TemporalCache.state_dict`] gave."""
        self.reset()
        count = int(state_dict.get("num_latent_frames", 0))
        for key, tensor in state_dict.items():
            if key == "num_latent_frames":
                continue
            tile, slash, name = key.rpartition("/")
            cache = self.tile(tile) if slash else self
            cache.tails[name] = tensor
            cache.num_latent_frames = count
        self.num_latent_frames = count
        for name in self.tiles:
            self.park(name)


@contextmanager
def tile_cache(cache: TemporalCache | None, rows: Span, columns: Span, needed: bool) -> Iterator[TemporalCache | None]:
    r"""The state of one tile of a stream; without a stream a passing one, or none if the tile is one chunk."""
    if cache is None:
        yield TemporalCache() if needed else None
        return
    name = f"{rows.start}.{columns.start}"
    yield cache.tile(name)
    cache.park(name)
