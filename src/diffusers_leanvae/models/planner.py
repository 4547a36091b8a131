"""What memory LeanVAE needs for a video, and which tiles and chunks fit into a budget. Arithmetic only.

The terms are the tensors alive at the peak of `AutoencoderKLLeanVAE._encode` and `._decode` without gradients; they
are compared with measurements in `results/bench_memory.json` (`benchmarks/memory.py`).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from .tiling import spans


class MemoryPlan(NamedTuple):
    r"""Sizes for `enable_tiling`, and what they cost.

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
        r"""The larger of both predictions."""
        return max(self.encode_bytes, self.decode_bytes)


@dataclass(frozen=True)
class MemoryModel:
    r"""The sizes of a model that its memory depends on.

    Attributes:
        dim: Width of the tokens.
        patch_dim: Pixel values per token.
        latent_channels: Channels of the latents.
        ratio_t: Temporal compression ratio.
        ratio_s: Spatial compression ratio.
        encoder_halo: Tokens that `encode` reads around a tile; also its number of causal convolutions in a row.
        decoder_halo: The same for `decode`.
        slice_elements: Elements of the temporary tensors of a slice (see `naf.slices`).
    """

    dim: int
    patch_dim: int
    latent_channels: int
    ratio_t: int
    ratio_s: int
    encoder_halo: int
    decoder_halo: int
    slice_elements: int

    def plan(
        self, shape: tuple[int, int, int, int], tile: tuple[int, int], num_frames_per_chunk: int, item_bytes: int
    ) -> MemoryPlan:
        r"""Cost of one choice.

        Args:
            shape: `(batch_size, num_frames, height, width)` of the video.
            tile: Height and width of a tile in pixels.
            num_frames_per_chunk: Frames of the first chunk.
            item_bytes: Bytes of a number of the model's dtype.
        """
        batch_size, num_frames, height, width = shape
        rows, columns = height // self.ratio_s, width // self.ratio_s
        num_latent = (num_frames - 1) // self.ratio_t + 1
        chunk = min(num_latent, num_frames_per_chunk // self.ratio_t + 1)
        is_chunked, is_tiled = chunk < num_latent, tile[0] < height or tile[1] < width
        results = []
        for halo, peak in ((self.encoder_halo, self._encode_peak), (self.decoder_halo, self._decode_peak)):
            outer = [
                [span.outer_stop - span.outer_start for span in spans(size, edge // self.ratio_s, halo)]
                for size, edge in ((rows, tile[0]), (columns, tile[1]))
            ]
            area = batch_size * max(outer[0]) * max(outer[1])
            elements = peak(area * chunk)
            if is_chunked:  # two steps per convolution, and one convolution's new ones beside its old ones
                elements += 2 * (halo + 1) * self.dim * area
            if is_chunked or is_tiled:  # the whole result, beside a tile's
                per_token = self.patch_dim if peak == self._decode_peak else 2 * self.latent_channels
                elements += per_token * batch_size * num_latent * rows * columns
            results.append((elements * item_bytes, sum(outer[0]) * sum(outer[1]) / (rows * columns)))
        (encode_bytes, encode_overhead), (decode_bytes, decode_overhead) = results
        return MemoryPlan(*tile, num_frames_per_chunk, encode_bytes, decode_bytes, encode_overhead, decode_overhead)

    def _slice(self, num_tokens: int) -> int:
        return min(self.slice_elements, 6 * self.patch_dim * num_tokens)

    def _encode_peak(self, num_tokens: int) -> int:
        tokens = self.dim * num_tokens
        joining = 2 * tokens  # strips, or branches, and the tensor they are joined to
        working = tokens + self._slice(num_tokens)  # blocks overwrite the tokens
        return max(joining, working) + 4 * self.latent_channels * num_tokens

    def _decode_peak(self, num_tokens: int) -> int:
        tokens = self.dim * num_tokens
        thresholding = 2 * tokens  # of the bottleneck: features and their sparse code
        unpatching = tokens + self.patch_dim * num_tokens  # the last tokens and the pixels
        return max(thresholding, unpatching) + self._slice(num_tokens) + 2 * self.latent_channels * num_tokens

    def fit(self, shape: tuple[int, int, int, int], item_bytes: int, budget: int) -> MemoryPlan:
        r"""The plan within `budget` bytes that computes least; with equal work the one with longer chunks.

        Raises:
            ValueError: If not even the smallest tiles fit.
        """
        _, num_frames, height, width = shape
        lengths = [num_frames] + [n for n in (65, 33, 17, 9, 5) if n < num_frames]
        lengths = [max(self.ratio_t * round((n - 1) / self.ratio_t), self.ratio_t) + 1 for n in lengths]
        plans = []
        for length in lengths:
            for num_rows in range(1, 65):
                # Tiles as square as the number of rows allows: a halo costs least around squares.
                tile_height = self._edge(height, num_rows)
                num_columns = max(round(num_rows * width / height), 1)
                for columns in {max(num_columns - 1, 1), num_columns, num_columns + 1}:
                    plan = self.plan(shape, (tile_height, self._edge(width, columns)), length, item_bytes)
                    if plan.peak_bytes <= budget:
                        plans.append(plan)
                if tile_height == self.ratio_s:
                    break
        if not plans:
            least = self.plan(shape, (self.ratio_s, self.ratio_s), self.ratio_t + 1, item_bytes)
            raise ValueError(
                f"`budget` must be at least about {least.peak_bytes / 2**20:.0f} MiB for {num_frames} frames of "
                f"{width}x{height}, got {budget / 2**20:.0f} MiB."
            )
        return min(plans, key=lambda p: (p.encode_overhead + 2.5 * p.decode_overhead, -p.num_frames_per_chunk))

    def _edge(self, size: int, count: int) -> int:
        return max(-(-size // (count * self.ratio_s)) * self.ratio_s, self.ratio_s)


def free_memory(device: torch.device) -> int:
    r"""Bytes that can still be allocated on a device (half of what the system has left on a CPU)."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            values = dict(line.split(":", 1) for line in file)
        return int(values["MemAvailable"].split()[0]) * 1024 // 2
    except (OSError, KeyError):
        return 4 * 2**30  # no way to ask without another dependency; a size every machine of today has
