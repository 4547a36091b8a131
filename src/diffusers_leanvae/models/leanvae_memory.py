"""Prediction of the memory that LeanVAE needs. Arithmetic only.

The terms are the tensors alive at the peak of `encode_moments` and `decode_sample` without gradients.
"""

from dataclasses import dataclass

from .memory_planning import Cost, MemoryModel


@dataclass(frozen=True)
class LeanVAEMemory(MemoryModel):
    """The sizes of a LeanVAE that its memory depends on. A halo is also a number of causal convolutions in a row.

    Attributes:
        dim: Width of the tokens.
        slice_elements: Elements of the temporary tensors of a slice (see `leanvae_blocks.slices`).
    """

    dim: int
    slice_elements: int

    @property
    def patch_dim(self) -> int:
        """Pixel values per token."""
        return self.frame_elements * self.ratio_t

    def cost(
        self, decoding: bool, shape: tuple[int, int, int, int], tile: tuple[int, int], num_frames_per_chunk: int
    ) -> Cost:
        num_frames = shape[1]
        halo = self.decoder_halo if decoding else self.encoder_halo
        positions = self._positions(decoding, shape, tile)
        num_frames_per_chunk = min(num_frames_per_chunk, num_frames)
        peak = self._decode_peak if decoding else self._encode_peak
        moments = 2 * self.latent_channels * self._num_latent(num_frames)
        per_position = self.frame_elements * num_frames if decoding else moments
        # Two steps per convolution, and one convolution's new ones together with its old ones.
        one_more = 2 * self.dim * positions.tile
        return Cost(
            working=peak(positions.tile, num_frames_per_chunk),
            result=per_position * positions.frame,
            tile_state=2 * halo * self.dim * positions.tile + one_more,
            state=2 * halo * self.dim * positions.computed + one_more,
            overhead=positions.computed / positions.frame,
        )

    def _slice(self, num_tokens: int) -> int:
        return min(self.slice_elements, 6 * self.patch_dim * num_tokens)

    def _encode_peak(self, area: int, num_frames: int) -> int:
        num_tokens = area * self._num_latent(num_frames)
        tokens = self.dim * num_tokens
        joining = 2 * tokens  # strips, or branches, and the tensor they are joined to
        working = tokens + self._slice(num_tokens)  # blocks overwrite the tokens
        return max(joining, working) + 4 * self.latent_channels * num_tokens

    def _decode_peak(self, area: int, num_frames: int) -> int:
        num_tokens = area * self._num_latent(num_frames)
        tokens = self.dim * num_tokens
        thresholding = 2 * tokens  # of the bottleneck: features and their sparse code
        unpatching = tokens + self.frame_elements * num_frames * area  # the last tokens and the pixels
        return max(thresholding, unpatching) + self._slice(num_tokens) + 2 * self.latent_channels * num_tokens
