"""Choice of tiles, chunks and steps for a budget of memory, by what a model says that it needs.

What LeanVAE needs is in `leanvae_memory.py`, what any other autoencoder needs in `traced_memory.py`; both are compared
with measurements in `results/bench_memory.json` (`benchmarks/memory.py`).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from .tiling import spans


class MemoryPlan(NamedTuple):
    """Sizes for `enable_tiling`, and what they cost.

    Attributes:
        tile_sample_min_height: Height of a tile in pixels.
        tile_sample_min_width: Width of a tile in pixels.
        num_frames_per_chunk: Frames of the first chunk.
        encode_bytes: Predicted peak of `encode` above weights and input; the latents are counted.
        decode_bytes: Predicted peak of `decode` above weights and latents; the decoded video is counted.
        encode_overhead: Tokens computed over tokens kept: 1.0 without halos.
        decode_overhead: The same for `decode`.
    """

    tile_sample_min_height: int
    tile_sample_min_width: int
    num_frames_per_chunk: int
    encode_bytes: int
    decode_bytes: int
    encode_overhead: float
    decode_overhead: float

    @property
    def peak_bytes(self) -> int:
        """The larger of both predictions."""
        return max(self.encode_bytes, self.decode_bytes)


class StreamPlan(NamedTuple):
    """Settings of a `StreamingEncoder`, a `StreamingDecoder` or both, and the memory they take.

    Attributes:
        num_frames_per_step: Frames that pass the network at once; the first step takes one more.
        layout: Height and width of a tile in pixels, and frames of a tile's first chunk (see `TemporalCache`); `None`
            without tiles.
        is_parked: Whether the state of the tiles must be kept on disk.
        num_bytes: Predicted peak above weights.
        overhead: Work, with moving parked states counted as work, over that without tiles.
    """

    num_frames_per_step: int
    layout: tuple[int, int, int] | None
    is_parked: bool
    num_bytes: int
    overhead: float

    @property
    def bound(self) -> int:
        """The least bound that it meets, with a tenth to spare: what the allocator loses between tensors."""
        return math.ceil(_MARGIN * self.num_bytes)


class OtherMemory(NamedTuple):
    """Bytes held by others than network and streams, such as FFmpeg.

    Attributes:
        fixed: Always.
        per_step_frame: For every frame of a step.
        writer: From the first frame that came out.
        per_written: For each of the last `max_written` frames that came out; x264 looks ahead so far.
        max_written: See `per_written`.
        compressing: Once more frames came out than are looked ahead. Before, they only wait; when the video ends
            earlier, they are compressed while no step is in memory any more.
    """

    fixed: int = 0
    per_step_frame: int = 0
    writer: int = 0
    per_written: int = 0
    max_written: int = 0
    compressing: int = 0

    def after(self, num_written: int | None) -> int:
        """Bytes of the writer after a number of frames, `None` for any number."""
        held = self.max_written if num_written is None else min(num_written, self.max_written)
        if num_written == 0:
            return 0
        compressing = self.compressing if num_written is None or num_written > self.max_written else 0
        return self.writer + self.per_written * held + compressing


_NOTHING = OtherMemory()
# Frames are converted from and to 8 bits in float32, whatever the dtype of the model.
_FLOAT_BYTES = 4


class Cost(NamedTuple):
    """Demand of one direction, in elements.

    Attributes:
        working: The peak of a chunk, without state and without the result of other chunks and tiles.
        result: That result.
        tile_state: The state that is in memory where those of all tiles but one are not needed, or on disk.
        state: All of it.
        overhead: Work, with that of halos, over that without tiles.
    """

    working: int
    result: int
    tile_state: int
    state: int
    overhead: float


# Decoding a token takes about 2.5 times the work of encoding it (145 to 58 G multiply-adds at 17x256x256).
_DECODE_WORK = 2.5
# A bound is met with a tenth to spare: what the allocator loses between tensors is not predicted.
_MARGIN = 1.1
# Reading and writing the state of a token, over encoding one latent frame of it: a rough figure for a common disk.
_PARKED_WORK = 1.0


class Positions(NamedTuple):
    """Latent positions, all videos of a batch together.

    Attributes:
        frame: Of a frame.
        tile: Of the largest tile with its halo.
        computed: Of all tiles with their halos.
    """

    frame: int
    tile: int
    computed: int


@dataclass(frozen=True)
class MemoryModel(ABC):
    """Model of the memory that an autoencoder takes; chooses what fits into a bound.

    Attributes:
        latent_channels: Channels of the latents.
        frame_elements: Pixel values of a frame over one latent.
        ratio_t: Temporal compression ratio.
        ratio_s: Spatial compression ratio.
        encoder_halo: Latents that `encode` reads around a tile.
        decoder_halo: The same for `decode`.
        is_local: Whether a tile goes through all its chunks before the next one (see `VideoAutoencoder.is_local`).
        num_frames_per_step: Frames of a first chunk where there are no tiles; `None` for whole clips.
    """

    latent_channels: int
    frame_elements: int
    ratio_t: int
    ratio_s: int
    encoder_halo: int
    decoder_halo: int
    is_local: bool
    num_frames_per_step: int | None

    @abstractmethod
    def cost(
        self,
        decoding: bool,
        shape: tuple[int, int, int, int],
        tile: tuple[int, int],
        num_frames_per_chunk: int,
        item_bytes: int,
    ) -> Cost:
        """Return the demand of one direction.

        Args:
            decoding: Whether latents are decoded.
            shape: `(batch_size, num_frames, height, width)` of the video.
            tile: Height and width of a tile in pixels.
            num_frames_per_chunk: Frames of the first chunk.
            item_bytes: Bytes of a number of the model's dtype.
        """

    def plan(
        self, shape: tuple[int, int, int, int], tile: tuple[int, int], num_frames_per_chunk: int, item_bytes: int
    ) -> MemoryPlan:
        """Return the cost of one choice.

        Args:
            shape: As the arguments of [`cost`].
            tile: See `shape`.
            num_frames_per_chunk: See `shape`.
            item_bytes: See `shape`.
        """
        _, num_frames, height, width = shape
        is_chunked = num_frames_per_chunk < num_frames
        is_tiled = tile[0] < height or tile[1] < width
        results = []
        for decoding in (False, True):
            cost = self.cost(decoding, shape, tile, num_frames_per_chunk, item_bytes)
            elements = cost.working
            if is_chunked:
                elements += cost.tile_state if self.is_local else cost.state
            if is_chunked or is_tiled:  # the whole result, in addition to a tile's
                elements += cost.result
            if is_chunked and not self.is_local:  # its chunks are joined at the end
                elements = max(elements, 2 * cost.result)
            results.append((elements * item_bytes, cost.overhead))
        (encode_bytes, encode_overhead), (decode_bytes, decode_overhead) = results
        return MemoryPlan(*tile, num_frames_per_chunk, encode_bytes, decode_bytes, encode_overhead, decode_overhead)

    def stream(
        self,
        frame: tuple[int, int],
        num_frames: int | None,
        num_frames_per_step: int,
        layout: tuple[int, int, int],
        item_bytes: int,
        *,
        is_parked: bool = False,
        encode: bool = True,
        decode: bool = True,
        others: OtherMemory = _NOTHING,
    ) -> StreamPlan:
        """Return the cost of frames that go through a `StreamingEncoder`, a `StreamingDecoder`, or both in turn.

        Counted are the frames that wait for a step, the step's result, the network, and the states of the streams.

        Args:
            frame: Height and width in pixels.
            num_frames: Frames of the video, `None` if not known.
            num_frames_per_step: Frames of a step; the first takes one more.
            layout: Height, width and frames of a tile.
            item_bytes: Bytes of a number of the model's dtype.
            is_parked: Whether the state of the tiles is on disk.
            encode: Whether frames are encoded.
            decode: Whether latents are decoded.
            others: What else is held.
        """
        height, width = frame
        num_taken = num_frames_per_step + 1 if num_frames is None else min(num_frames_per_step + 1, num_frames)
        num_taken = self.ratio_t * -(-(num_taken - 1) // self.ratio_t) + 1  # what padding makes of it
        tile, num_frames_per_chunk = layout[:2], min(layout[2], num_taken)
        is_chunked = num_frames_per_chunk < num_taken
        # A model that takes clips in chunks anyway is told which.
        is_tiled = layout[0] < height or layout[1] < width or is_chunked or is_parked or bool(self.num_frames_per_step)
        # A stream that ends before its first step is full is one whole video, and remembers nothing.
        is_long = num_frames is None or num_frames > num_frames_per_step
        one_frame = self.frame_elements * (height // self.ratio_s) * (width // self.ratio_s)
        before = others.after(None if num_frames is None else max(num_frames - num_taken, 0))
        after = others.after(num_frames)
        peaks, states, overhead = [], 0, 0.0
        for decoding in [False] * encode + [True] * decode:
            # The first step fills the state while it works, and a later one works on one latent frame less: together
            # they stay below one that does all of the first step's work with a full state.
            cost = self.cost(decoding, (1, num_taken, height, width), tile, num_frames_per_chunk, item_bytes)
            working = cost.working
            if is_tiled:
                working += cost.result
            if is_long and not is_parked:
                states += cost.state
            elif is_long or is_chunked:
                working += cost.tile_state if self.is_local or is_parked else cost.state
            if is_chunked and not self.is_local:
                working = max(working, 2 * cost.result)
            # Beside the step's frames either the network works, or one of them is converted from or to 8 bits.
            frames, converting = num_taken * one_frame * item_bytes, 2 * one_frame * _FLOAT_BYTES
            if decoding:
                peaks.append(working * item_bytes + before)
                peaks.append(frames + converting + after)
            else:
                peaks.append(frames + max(working * item_bytes, converting) + before)
            overhead += cost.overhead * (_DECODE_WORK if decoding else 1)
        overhead /= encode + decode * _DECODE_WORK
        if is_parked:
            overhead += _PARKED_WORK / (num_frames_per_step // self.ratio_t)
        num_bytes = max(peaks) + states * item_bytes + others.fixed + others.per_step_frame * num_taken
        return StreamPlan(num_frames_per_step, layout if is_tiled else None, is_parked, num_bytes, overhead)

    def fit(self, shape: tuple[int, int, int, int], item_bytes: int, budget: int) -> MemoryPlan:
        """Return the plan within `budget` bytes that computes least; with equal work the one with longer chunks.

        Raises:
            ValueError: If not even the smallest tiles fit.
        """
        _, num_frames, height, width = shape
        lengths = [num_frames] + [n for n in (65, 33, 17, 9, 5) if n < num_frames]
        lengths = [max(self.ratio_t * round((n - 1) / self.ratio_t), self.ratio_t) + 1 for n in lengths]
        plans = [
            self.plan(shape, tile, length, item_bytes) for length in lengths for tile in self._tiles(height, width)
        ]
        fitting = [plan for plan in plans if plan.peak_bytes <= budget]
        if not fitting:
            least = min(plan.peak_bytes for plan in plans)
            raise ValueError(_too_small("budget", least, f"{num_frames} frames of {width}x{height}", budget))
        return min(
            fitting, key=lambda p: (p.encode_overhead + _DECODE_WORK * p.decode_overhead, -p.num_frames_per_chunk)
        )

    def fit_stream(
        self,
        frame: tuple[int, int],
        num_frames: int | None,
        item_bytes: int,
        max_memory: int,
        *,
        max_frames_per_step: int = 16,
        encode: bool = True,
        decode: bool = True,
        others: OtherMemory = _NOTHING,
    ) -> StreamPlan:
        """Return the settings of streams within `max_memory` bytes that take least work, then with the longest steps.

        Args:
            frame: As the arguments up to `item_bytes` of [`stream`].
            num_frames: See `frame`.
            item_bytes: See `frame`.
            max_memory: Bytes above weights.
            max_frames_per_step: Longest step to take.
            encode: As of [`stream`].
            decode: As of [`stream`].
            others: As of [`stream`].

        Raises:
            ValueError: If nothing fits; it says what would.
        """
        plans = []
        steps = {max(n // self.ratio_t, 1) * self.ratio_t for n in (4, 8, 16, max_frames_per_step)}
        steps = {step for step in steps if step <= max_frames_per_step} or {self.ratio_t}
        if num_frames is not None and num_frames <= max(steps) + 1:  # to end before the first step is full
            steps = {-(-num_frames // self.ratio_t) * self.ratio_t} | {step for step in steps if step < num_frames}
        for step in steps:
            is_long = num_frames is None or num_frames > step
            for length in {step + 1, self.ratio_t * (step // self.ratio_t // 2 or 1) + 1, self.ratio_t + 1}:
                for tile in self._tiles(*frame):
                    for is_parked in (False, True)[: 1 + is_long]:
                        plans.append(
                            self.stream(
                                frame,
                                num_frames,
                                step,
                                (*tile, length),
                                item_bytes,
                                is_parked=is_parked,
                                encode=encode,
                                decode=decode,
                                others=others,
                            )
                        )
        fitting = [plan for plan in plans if plan.bound <= max_memory]
        if not fitting:
            least = min(plan.bound for plan in plans)
            raise ValueError(_too_small("max_memory", least, f"frames of {frame[1]}x{frame[0]}", max_memory))
        return min(fitting, key=lambda p: (p.overhead, -p.num_frames_per_step, p.num_bytes))

    def _num_latent(self, num_frames: int) -> int:
        return (num_frames - 1) // self.ratio_t + 1

    def _positions(self, decoding: bool, shape: tuple[int, int, int, int], tile: tuple[int, int]) -> Positions:
        batch_size, _, height, width = shape
        rows, columns = self._along_axis(decoding, height, tile[0]), self._along_axis(decoding, width, tile[1])
        return Positions(*(batch_size * row * column for row, column in zip(rows, columns, strict=True)))

    def _along_axis(self, decoding: bool, size: int, tile: int) -> Positions:
        halo = self.decoder_halo if decoding else self.encoder_halo
        return _positions_along_axis(size // self.ratio_s, tile // self.ratio_s, halo)

    def _tiles(self, height: int, width: int) -> Iterator[tuple[int, int]]:
        """Tile sizes to try: as square as the number of rows allows, for a halo costs least around squares."""
        for num_rows in range(1, 65):
            tile_height = self._edge(height, num_rows)
            num_columns = max(round(num_rows * width / height), 1)
            for columns in {max(num_columns - 1, 1), num_columns, num_columns + 1}:
                yield tile_height, self._edge(width, columns)
            if tile_height == self.ratio_s:
                return

    def _edge(self, size: int, count: int) -> int:
        return max(-(-size // (count * self.ratio_s)) * self.ratio_s, self.ratio_s)


@lru_cache(maxsize=4096)  # `fit` asks for the same edges again and again
def _positions_along_axis(size: int, tile: int, halo: int) -> Positions:
    outer = [span.outer_stop - span.outer_start for span in spans(size, tile, halo)]
    return Positions(size, max(outer), sum(outer))


def _too_small(name: str, least: int, what: str, got: int) -> str:
    return f"`{name}` must be at least about {-(-least // 2**20)} MiB for {what}, got {got / 2**20:.0f} MiB."


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device (half of what the system has left on a CPU)."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            values = dict(line.split(":", 1) for line in file)
        return int(values["MemAvailable"].split()[0]) * 1024 // 2
    except (OSError, KeyError):
        return 4 * 2**30  # no way to ask without another dependency; a size every machine of today has
