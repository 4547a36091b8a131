"""Geometry of exact tiling: which tokens a tile computes, which of them it keeps, and how a video is cut in time."""

from typing import Any, NamedTuple

import torch

from ..checks import is_integer


def check_layout(name: str, value: Any) -> None:
    """Raise a `ValueError` unless `value` may be the sizes of a tile; which of them a model takes, it knows itself."""
    is_triple = isinstance(value, (tuple, list)) and len(value) == 3
    if not is_triple or not all(is_integer(size) and size > 0 for size in value):
        raise ValueError(
            f"`{name}` must be three positive integers, height, width and frames of a tile, got {value!r}."
        )


class Span(NamedTuple):
    """One tile along one axis, in tokens: what it writes, and what it must read to compute that exactly."""

    start: int
    stop: int
    outer_start: int
    outer_stop: int

    def target(self, scale: int = 1) -> slice:
        """Place of the result in the whole, `scale` units per token."""
        return slice(self.start * scale, self.stop * scale)

    def source(self, scale: int = 1) -> slice:
        """Part of the whole that the tile reads: itself and its halo, cut at the true borders."""
        return slice(self.outer_start * scale, self.outer_stop * scale)

    def crop(self, scale: int = 1) -> slice:
        """Place of the result in what the tile computed."""
        return slice((self.start - self.outer_start) * scale, (self.stop - self.outer_start) * scale)


class Tile(NamedTuple):
    """Rows and columns of one tile."""

    rows: Span
    columns: Span

    @property
    def name(self) -> str:
        """Key of the tile in the state of a stream."""
        return f"{self.rows.start}.{self.columns.start}"

    def read(self, whole: torch.Tensor, scale: int = 1) -> torch.Tensor:
        """View of the part of a video `(..., height, width)` that the tile needs, with `scale` elements per token."""
        return whole[..., self.rows.source(scale), self.columns.source(scale)]

    def crop(self, part: torch.Tensor, scale: int = 1) -> torch.Tensor:
        """View of the part that the tile keeps of what it computed."""
        return part[..., self.rows.crop(scale), self.columns.crop(scale)]

    def place(self, whole: torch.Tensor, scale: int = 1) -> torch.Tensor:
        """View of the place where that belongs."""
        return whole[..., self.rows.target(scale), self.columns.target(scale)]


class TileSizes(NamedTuple):
    """Sizes of tiles in tokens (height and width) and of chunks in latent frames; `None` is uncut."""

    height: int | None = None
    width: int | None = None
    num_latent_frames: int | None = None


class Canvas:
    """The result of tiles and chunks, made when the first one comes: its dtype is theirs, which autocast chooses.

    Args:
        num_frames: Frames of the result; `None` for as many as a part has.
        height: Height of the result in tokens.
        width: Width of the result in tokens.
        scale: Elements of the result per token along height and along width.
    """

    def __init__(self, num_frames: int | None, height: int, width: int, scale: int = 1) -> None:
        self.size = (num_frames, height * scale, width * scale)
        self.scale = scale
        self._whole: torch.Tensor | None = None

    def choose(self, tiles: list[Tile]) -> list[Tile]:
        """Return the tiles to compute here: all of them."""
        return tiles

    def put(self, part: torch.Tensor, frames: slice, tile: Tile) -> None:
        """Write the result of a tile."""
        num_frames, height, width = self.size
        size = (part.shape[2] if num_frames is None else num_frames, height, width)
        if part.shape[2:] == size:
            self._whole = part  # all at once: nothing to copy
            return
        if self._whole is None:
            self._whole = part.new_empty(*part.shape[:2], *size)
        tile.place(self._whole[:, :, frames], self.scale)[:] = part

    def take(self) -> torch.Tensor:
        """Return the result."""
        assert self._whole is not None  # there is at least one tile
        return self._whole


def spans(size: int, tile: int, halo: int) -> list[Span]:
    """Cut `size` tokens into tiles of at most `tile`, as even as possible, each with a halo of `halo` tokens."""
    count = -(-size // tile)
    edges = [round(i * size / count) for i in range(count + 1)]
    return [
        Span(start, stop, max(start - halo, 0), min(stop + halo, size))
        for start, stop in zip(edges[:-1], edges[1:], strict=True)
    ]


def grid(height: int, width: int, sizes: TileSizes, halo: int) -> list[Tile]:
    """Cut `height` x `width` tokens into tiles."""
    return [
        Tile(rows, columns)
        for rows in spans(height, sizes.height or height, halo)
        for columns in spans(width, sizes.width or width, halo)
    ]


def time_chunks(num_latent_frames: int, per_chunk: int | None, is_first: bool) -> list[tuple[int, int]]:
    """Bounds of the chunks, in latent frames: `per_chunk` each, one more (the image) for the first of a stream."""
    if per_chunk is None or num_latent_frames == 0:
        return [(0, num_latent_frames)]
    chunks, start = [], 0
    while start < num_latent_frames:
        stop = min(start + per_chunk + (is_first and start == 0), num_latent_frames)
        chunks.append((start, stop))
        start = stop
    return chunks
