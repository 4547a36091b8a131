"""Geometry of exact tiling: which tokens a tile computes, which of them it keeps, and how a video is cut in time."""

from collections.abc import Sequence
from typing import NamedTuple


class Span(NamedTuple):
    r"""One tile along one axis, in tokens: what it writes, and what it must read to compute that exactly."""

    start: int
    stop: int
    outer_start: int
    outer_stop: int

    def target(self, scale: int = 1) -> slice:
        r"""Where the result lies in the whole, `scale` units per token."""
        return slice(self.start * scale, self.stop * scale)

    def source(self, scale: int = 1) -> slice:
        r"""What the tile reads from the whole: itself and its halo, cut at the true borders."""
        return slice(self.outer_start * scale, self.outer_stop * scale)

    def crop(self, scale: int = 1) -> slice:
        r"""Where the result lies in what the tile computed."""
        return slice((self.start - self.outer_start) * scale, (self.stop - self.outer_start) * scale)


def spans(size: int, tile: int, halo: int) -> list[Span]:
    r"""Cut `size` tokens into tiles of at most `tile`, as even as possible, each with a halo of `halo` tokens."""
    count = -(-size // tile)
    edges = [round(i * size / count) for i in range(count + 1)]
    return [
        Span(start, stop, max(start - halo, 0), min(stop + halo, size))
        for start, stop in zip(edges[:-1], edges[1:], strict=True)
    ]


def grid(height: int, width: int, tile: Sequence[int], halo: int) -> list[tuple[Span, Span]]:
    r"""Rows and columns of every tile of `height` x `width` tokens, `tile` high and wide at most."""
    return [(rows, columns) for rows in spans(height, tile[0], halo) for columns in spans(width, tile[1], halo)]


def time_chunks(num_latent_frames: int, per_chunk: int, is_first: bool) -> list[tuple[int, int]]:
    r"""Bounds of the chunks, in latent frames: `per_chunk` each, one more (the image) for the first of a stream."""
    chunks, start = [], 0
    while start < num_latent_frames:
        stop = min(start + per_chunk + (is_first and start == 0), num_latent_frames)
        chunks.append((start, stop))
        start = stop
    return chunks
