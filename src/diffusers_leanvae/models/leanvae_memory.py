"""Prediction of the memory that LeanVAE needs. Arithmetic only.

The terms are the tensors alive at the peaks of `_encode_local` and `_decode_local` without gradients: where layers
work in slices (see `leanvae_blocks.slices`), those of the largest slice. `tests/models/test_leanvae_memory.py`
compares them with what the network itself keeps alive.
"""

from dataclasses import dataclass

from .memory_planning import Cost, MemoryModel


# Copies of the pixels of a strip at once, on the way to tokens and back: what each level of the wavelet reads and
# writes beside its input; parts, sub-bands, and the result before and after its scaling.
_EMBEDDING_COPIES, _SYNTHESIS_COPIES = 3, 4
# Copies that an estimate of a strip assumes when its height is chosen (`by_strips` of encoder and decoder).
_STRIP_COPIES = 6


@dataclass(frozen=True)
class LeanVAEMemory(MemoryModel):
    """The sizes of a LeanVAE that its memory depends on. A halo is also a number of causal convolutions in a row.

    Attributes:
        dim: Width of the tokens.
        branch_dim: Width of the tokens of the last branch; that of all without branches.
        inner_dim: Inner width of a feed-forward of fused tokens.
        has_sparse_code: Whether the bottleneck keeps features and their sparse code.
        slice_elements: Elements of the temporary tensors of a slice (see `leanvae_blocks.slices`).
        on_cpu: Whether convolutions of 16-bit tokens are computed in float32.
    """

    dim: int
    branch_dim: int
    inner_dim: int
    has_sparse_code: bool
    slice_elements: int
    on_cpu: bool

    def cost(
        self,
        decoding: bool,
        shape: tuple[int, int, int, int],
        tile: tuple[int, int],
        num_frames_per_chunk: int,
        item_bytes: int,
    ) -> Cost:
        num_frames = shape[1]
        halo = self.decoder_halo if decoding else self.encoder_halo
        positions = self._positions(decoding, shape, tile)
        num_rows = self._along_axis(decoding, shape[2], tile[0]).tile
        num_frames_per_chunk = min(num_frames_per_chunk, num_frames)
        peak = self._decode_peak if decoding else self._encode_peak
        moments = 2 * self.latent_channels * self._num_latent(num_frames)
        per_position = self.frame_elements * num_frames if decoding else moments
        # Two steps per convolution, and one convolution's new ones together with its old ones.
        one_more = 2 * self.dim * positions.tile
        return Cost(
            working=peak(positions.tile, num_rows, num_frames_per_chunk, item_bytes),
            result=per_position * positions.frame,
            tile_state=2 * halo * self.dim * positions.tile + one_more,
            state=2 * halo * self.dim * positions.computed + one_more,
            overhead=positions.computed / positions.frame,
        )

    def _encode_peak(self, area: int, num_rows: int, num_frames: int, item_bytes: int) -> int:
        num_tokens = area * self._num_latent(num_frames)
        tokens, moments = self.dim * num_tokens, 2 * self.latent_channels * num_tokens
        image, video = self.frame_elements, self.frame_elements * (num_frames - 1)
        first, second = self._strips(num_rows, (image + video) * area // num_rows)
        # The pixels of a strip on their way, next to its image's patches and tokens; or its tokens being joined.
        on_the_way = max(_EMBEDDING_COPIES * image, (_EMBEDDING_COPIES * video + image + self.dim) * (video > 0))
        per_row = max(on_the_way, video + 2 * tokens // area) * area // num_rows
        embedding = first * per_row
        if second:  # the result, and of the strip before what the loop still holds
            embedding = max(embedding, tokens + self.branch_dim * num_tokens // num_rows * first + second * per_row)
        joining = 2 * tokens  # branches, and the tensor they are joined to
        # Blocks overwrite the tokens. Moments are joined and then brought into their order.
        return max(embedding, joining, tokens + max(self._block(area, num_tokens, item_bytes), 2 * moments))

    def _decode_peak(self, area: int, num_rows: int, num_frames: int, item_bytes: int) -> int:
        num_latent = self._num_latent(num_frames)
        num_tokens = area * num_latent
        tokens, pixels = self.dim * num_tokens, self.frame_elements * num_frames * area
        blocks = tokens + self._block(area, num_tokens, item_bytes)
        if self.has_sparse_code:  # beside the features, and an error for every latent
            blocks += tokens + self.latent_channels * num_tokens
        estimated = self.frame_elements * self.ratio_t * num_latent * area
        first, second = self._strips(num_rows, estimated // num_rows)
        synthesis = tokens + _SYNTHESIS_COPIES * first * pixels // num_rows
        if second:  # the result, and the strip before
            strips = (first + _SYNTHESIS_COPIES * second) * pixels // num_rows
            synthesis = max(synthesis, tokens + pixels + strips)
        return max(blocks, synthesis)

    def _block(self, area: int, num_tokens: int, item_bytes: int) -> int:
        """Temporary tensors of a block: of its feed-forward, or of its convolution if that takes more."""
        per_token = 4 * self.inner_dim
        feed_forward = per_token * self._num_per_slice(per_token, num_tokens)
        padded = num_tokens + 2 * area  # with the steps before
        channels = self._num_per_slice(2 * padded, self.dim)
        convolution = padded + num_tokens
        if self.on_cpu and item_bytes < 4:  # input, weights, bias and result in float32, and the result once more
            convolution = (convolution + 3**3 + 1) * 4 // item_bytes + num_tokens
        return max(feed_forward, channels * convolution)

    def _strips(self, num_rows: int, elements_per_row: int) -> tuple[int, int]:
        """Rows of the first and of the second strip."""
        first = self._num_per_slice(_STRIP_COPIES * elements_per_row, num_rows)
        return first, min(first, num_rows - first)

    def _num_per_slice(self, elements_per_item: int, size: int) -> int:
        return min(max(self.slice_elements // elements_per_item, 1), size)
