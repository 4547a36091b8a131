"""Blocks of LeanVAE with prepared weights, for `leanvae_fused.py`.

- The inner width of a feed-forward is padded with zeros, which change nothing, to one that matrix kernels like.
- On CPUs a block is computed slab by slab of tokens, in place: convolution, residual, LayerNorm, feed-forward, while
  the slab is in the processor's cache. Slabs go backward in time, so that what a causal convolution reads is not
  overwritten yet, and nothing is concatenated with the state of a stream. Between the matrix products there are as few
  passes as possible, in C++ where it can be compiled.
- On GPUs whole tensors go through the kernels of `kernels/`.

Tokens are channels-last `(B, t, h, w, c)` and contiguous. Pinned by `tests/models/test_leanvae_fused.py`.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels import Kernels
from ..kernels.slabs import CHANNEL_MULTIPLE, DepthwiseParameters, SlabKernels, pack_taps
from .leanvae_blocks import LeanVAEBlock, LeanVAEBlocks, exchange_tail, slice_elements, slices
from .temporal_cache import Chunk


WIDTH_MULTIPLE = 32  # of inner widths: aligned rows in every dtype, whole tiles of matrix kernels
CPU_SLAB_TOKENS = 1024  # enough rows for full speed of a product, few enough to stay in the cache
SLICES_ON_GPU = 8  # of what `slices` allows: the hidden tensor of some 50,000 tokens of width 512


class Slab(NamedTuple):
    """Tokens that are computed together: whole frames, or rows of one frame."""

    start: int  # first time step, and the one after the last
    stop: int
    top: int  # first row, and the one after the last
    bottom: int

    @property
    def steps(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def rows(self) -> slice:
        return slice(self.top, self.bottom)


def slabs(num_steps: int, height: int, width: int, num_tokens: int) -> Iterator[Slab]:
    """Cut `(num_steps, height, width)` tokens into slabs of about `num_tokens`, the latest steps first."""
    per_frame = height * width
    if per_frame <= num_tokens:
        step = num_tokens // per_frame
        for stop in range(num_steps, 0, -step):
            yield Slab(max(stop - step, 0), stop, 0, height)
    else:
        num_rows = max(num_tokens // width, 1)
        for start in reversed(range(num_steps)):
            for top in range(0, height, num_rows):
                yield Slab(start, start + 1, top, min(top + num_rows, height))


class Workspace:
    """Memory that all blocks of one call use in turn: fresh memory of this size costs as much as an elementwise pass.

    Args:
        like: The input of the call.
        dtype: Of products.
        max_inner_dim: The widest inner width of a feed-forward.

    Attributes:
        num_tokens: Tokens of a slab; a slab of whole rows may have a few more.
    """

    def __init__(self, like: torch.Tensor, dtype: torch.dtype, max_inner_dim: int):
        limit = slice_elements(like.device) // (2 * max_inner_dim)
        self.num_tokens = min(CPU_SLAB_TOKENS, limit) if like.device.type == "cpu" else limit
        self._dtype, self._device = dtype, like.device
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, name: str, num_tokens: int, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """`(num_tokens, dim)` of the buffer of a name, with anything in it, by default of the dtype of products."""
        size = num_tokens * dim
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers.pop(name, None)  # before there is another
            self._buffers[name] = torch.empty(size, dtype=dtype or self._dtype, device=self._device)
        return self._buffers[name][:size].view(num_tokens, dim)


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Dtype in which matrix products of tensors of `dtype` are computed: float32 on CPUs without 16-bit products.

    Those emulate them several times slower. The sums are the same, and are rounded once instead of at each step.
    """
    is_slow = device.type == "cpu" and dtype.itemsize == 2 and not _onednn_has_products(dtype)
    return torch.float32 if is_slow else dtype


def _onednn_has_products(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes products of a dtype here, without emulation."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    names = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    return dtype == torch.float32 or (dtype in names and getattr(torch.ops.mkldnn, names[dtype])())


class DenseProduct:
    """`x @ weight.T` into given memory, all in the [`product_dtype`] of the weight."""

    def __init__(self, weight: torch.Tensor):
        self.weight = weight.to(product_dtype(weight.dtype, weight.device)).contiguous()

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return torch.mm(x, self.weight.t(), out=out)


class PackedProduct:
    """As [`DenseProduct`], with the weight in the blocks of oneDNN, and in memory of its own: oneDNN takes no other.

    Faster with AVX-512 (`benchmarks/products.py`).
    """

    def __init__(self, weight: torch.Tensor):
        weight = weight.to(product_dtype(weight.dtype, weight.device)).contiguous()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, CPU_SLAB_TOKENS)

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


def same_product(weight: torch.Tensor) -> DenseProduct | PackedProduct:
    """Prepare a weight for products in its [`product_dtype`], packed where that is known to be faster."""
    dtype = product_dtype(weight.dtype, weight.device)
    has_avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    is_packed = weight.device.type == "cpu" and has_avx512 and _onednn_has_products(dtype)
    return PackedProduct(weight) if is_packed else DenseProduct(weight)


# Prepares a weight `(out_features, in_features)`; the result is called with `x`, and memory that it may use for what
# it returns or not: `x @ weight.T`.
PrepareProduct = Callable[[torch.Tensor], Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]
MakeBlock = Callable[[Any, float | None], "FusedBlock"]


class FusedBlock:
    """A [`LeanVAEBlock`] with prepared weights; how it is computed, slab by slab or whole, is a subclass's matter.

    Args:
        block: The block. Prepared weights may share memory with its own, and are of no use when those change.
        threshold: Soft threshold of the output, if any.
    """

    def __init__(self, block: LeanVAEBlock, threshold: float | None):
        conv, norm, up_proj, down_proj = block.conv, block.ff.norm, block.ff.up_proj, block.ff.down_proj
        for layer in (up_proj, down_proj):
            if type(layer) is not nn.Linear:
                raise ValueError(f"`fuse` must be called on plain layers (merge adapters first), got {type(layer)}.")
        self.name, self.residual, self.threshold = conv.name, block.residual, threshold
        dtype, device = up_proj.weight.dtype, up_proj.weight.device
        # PyTorch has no fast 16-bit depthwise kernel on CPU; float32 there also keeps residual and norm exact.
        self.dtype = torch.float32 if device.type == "cpu" and dtype.itemsize < 4 else dtype
        conv_weight, self.bias, self.norm_weight, self.norm_bias = (
            x.detach().to(self.dtype)  # type: ignore[union-attr]
            for x in (conv.weight, conv.bias, norm.weight, norm.bias)
        )
        self.eps = norm.eps
        inner_dim = block.ff.inner_dim
        self.inner_dim = -(-inner_dim // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        padding = self.inner_dim - inner_dim
        value, gate = (F.pad(half, (0, 0, 0, padding)) for half in up_proj.weight.detach().split(inner_dim))
        self._prepare(conv_weight, value, gate, F.pad(down_proj.weight.detach(), (0, padding)))

    def __call__(
        self,
        hidden_states: torch.Tensor,
        chunk: Chunk,
        workspace: Workspace,
        keeps_input: bool = False,
        base: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Overwrites `hidden_states`, unless told to keep it, and `base`, which a block without residual adds."""
        tail = exchange_tail(self.name, hidden_states, chunk)
        return self._compute(hidden_states, tail, keeps_input, base, workspace)

    def _prepare(self, conv_weight: torch.Tensor, value: torch.Tensor, gate: torch.Tensor, down: torch.Tensor) -> None:
        """Keep weights as they are needed.

        Args:
            conv_weight: `(c, 1, 3, 3, 3)`.
            value, gate: Of the feed-forward, padded, `(inner_dim, c)` each.
            down: `(c, inner_dim)`.
        """
        raise NotImplementedError

    def _compute(
        self,
        hidden_states: torch.Tensor,
        tail: torch.Tensor | None,
        keeps_input: bool,
        base: torch.Tensor | None,
        workspace: Workspace,
    ) -> torch.Tensor:
        raise NotImplementedError


class SlabInput(NamedTuple):
    """What a slab is computed from.

    Attributes:
        frames: All tokens `(t, h, w, c)`; in place, those after the slab's time step are overwritten already.
        tail: The two time steps before them, or `None` for zeros.
        above: The row above the slab as it was, `(w, c)`, where `frames` has another by now; or `None`.
        slab: What of the tokens is computed.
    """

    frames: torch.Tensor
    tail: torch.Tensor | None
    above: torch.Tensor | None
    slab: Slab


class SlabBlock(FusedBlock):
    """A block computed slab by slab; what a slab takes between its products is a subclass's matter.

    Args:
        prepare_product: What prepares the products of the feed-forward.
    """

    def __init__(self, block: LeanVAEBlock, threshold: float | None, prepare_product: PrepareProduct):
        self.prepare_product = prepare_product
        super().__init__(block, threshold)

    def _prepare(self, conv_weight: torch.Tensor, value: torch.Tensor, gate: torch.Tensor, down: torch.Tensor) -> None:
        self.value, self.gate, self.down = map(self.prepare_product, (value, gate, down))

    def _compute(
        self,
        hidden_states: torch.Tensor,
        tail: torch.Tensor | None,
        keeps_input: bool,
        base: torch.Tensor | None,
        workspace: Workspace,
    ) -> torch.Tensor:
        batch_size, num_steps, height, width, channels = hidden_states.shape
        is_in_place = not keeps_input
        target = hidden_states if is_in_place else torch.empty_like(hidden_states)
        for item in range(batch_size):
            frames, item_tail = hidden_states[item], None if tail is None else tail[item]
            last_row: torch.Tensor | None = None  # of the strip above, before it was overwritten
            for slab in slabs(num_steps, height, width, workspace.num_tokens):
                above = last_row if is_in_place and slab.top > 0 else None
                if is_in_place and slab.bottom < height:
                    last_row = frames[slab.start, slab.bottom - 1].clone()
                part = item, slab.steps, slab.rows
                added = None if base is None else base[part].view(-1, channels)
                source = SlabInput(frames, item_tail, above, slab)
                self._compute_slab(source, added, target[part].view(-1, channels), workspace)
        return target

    def _compute_slab(
        self, source: SlabInput, base: torch.Tensor | None, out: torch.Tensor, workspace: Workspace
    ) -> None:
        """Compute a slab into `out`, `(num_tokens, c)`; `base`, if there is one, is added in place of the residual."""
        raise NotImplementedError

    def _added(self, convolved: torch.Tensor, base: torch.Tensor | None) -> torch.Tensor | None:
        """What is added to the feed-forward, if anything is."""
        return base if base is not None else convolved if self.residual else None


class TorchSlabBlock(SlabBlock):
    """A [`SlabBlock`] in plain PyTorch."""

    def _prepare(self, conv_weight: torch.Tensor, value: torch.Tensor, gate: torch.Tensor, down: torch.Tensor) -> None:
        super()._prepare(conv_weight, value, gate, down)
        self.taps = [conv_weight[:, :, delay].contiguous() for delay in (2, 1, 0)]  # by delay in time

    def _compute_slab(
        self, source: SlabInput, base: torch.Tensor | None, out: torch.Tensor, workspace: Workspace
    ) -> None:
        convolved = self._convolve(*source)
        self._feed_forward(convolved, self._added(convolved, base), out, workspace)

    def _convolve(
        self, frames: torch.Tensor, tail: torch.Tensor | None, above: torch.Tensor | None, slab: Slab
    ) -> torch.Tensor:
        """Convolution, and residual, of a slab of `(t, h, w, c)` tokens, as `(num_tokens, c)`."""
        rows = slice(max(slab.top - 1, 0), min(slab.bottom + 1, frames.shape[1]))
        current = frames[slab.steps, rows]
        if above is not None:
            current = current.clone()
            current[:, 0] = above
        current = current.to(self.dtype)
        output = self._conv2d(current, 0, self.bias)
        for delay in (1, 2):
            start = max(slab.start, delay)
            if start < slab.stop:
                source = frames[start - delay : slab.stop - delay, rows]
                output[start - slab.start :] += self._conv2d(source.to(self.dtype), delay)
            stop = min(slab.stop, delay)
            if tail is not None and slab.start < stop:  # without a stream, zeros precede the first step
                source = tail[2 + slab.start - delay : 2 + stop - delay, rows]
                output[: stop - slab.start] += self._conv2d(source.to(self.dtype), delay)
        if self.residual:
            output += current
        top = slab.top - rows.start
        return output[:, top : top + slab.bottom - slab.top].reshape(-1, frames.shape[-1])

    def _conv2d(self, frames: torch.Tensor, delay: int, bias: torch.Tensor | None = None) -> torch.Tensor:
        # The permuted view is `channels_last`: no copy.
        frames = frames.permute(0, 3, 1, 2)
        return F.conv2d(frames, self.taps[delay], bias, padding=1, groups=frames.shape[1]).permute(0, 2, 3, 1)

    def _feed_forward(
        self, tokens: torch.Tensor, residual: torch.Tensor | None, out: torch.Tensor, workspace: Workspace
    ) -> None:
        gate, value = (workspace.take(name, len(tokens), self.inner_dim) for name in ("gate", "value"))
        normed = F.layer_norm(tokens, tokens.shape[1:], self.norm_weight, self.norm_bias, self.eps).to(gate.dtype)
        hidden = torch.ops.aten.gelu_(self.gate(normed, gate)).mul_(self.value(normed, value))
        target = out if out.dtype == hidden.dtype else hidden.new_empty(out.shape)
        if residual is None:
            target = self.down(hidden, target)
        elif isinstance(self.down, DenseProduct) and residual.dtype == hidden.dtype:
            torch.addmm(residual, hidden, self.down.weight.t(), out=target)
        else:  # the sum in the residual's dtype
            torch.add(residual, self.down(hidden, hidden.new_empty(out.shape)), out=target)
        if self.threshold is not None:
            soft_threshold_(target, self.threshold)
        if target is not out:
            out.copy_(target)


class CppSlabBlock(SlabBlock):
    """A [`SlabBlock`] with what lies between the products in C++, in one pass each.

    Args:
        kernels: Of `kernels.slabs.load`.
    """

    def __init__(
        self, block: LeanVAEBlock, threshold: float | None, prepare_product: PrepareProduct, kernels: SlabKernels
    ):
        self.kernels = kernels
        super().__init__(block, threshold, prepare_product)

    @staticmethod
    def takes(block: LeanVAEBlock) -> bool:
        """Tell whether the kernels are for the width of a block."""
        return block.ff.up_proj.in_features % CHANNEL_MULTIPLE == 0

    def _prepare(self, conv_weight: torch.Tensor, value: torch.Tensor, gate: torch.Tensor, down: torch.Tensor) -> None:
        super()._prepare(conv_weight, value, gate, down)
        vectors = self.bias, self.norm_weight, self.norm_bias
        self.depthwise = DepthwiseParameters(pack_taps(conv_weight), *vectors, self.eps, self.residual)

    def _compute_slab(
        self, source: SlabInput, base: torch.Tensor | None, out: torch.Tensor, workspace: Workspace
    ) -> None:
        num_tokens, channels = out.shape
        convolved = workspace.take("convolved", num_tokens, channels, torch.float32)
        normed = workspace.take("normed", num_tokens, channels)
        self.kernels.convolve_and_normalize(*source, self.depthwise, convolved, normed)
        gate, value = (workspace.take(name, num_tokens, self.inner_dim) for name in ("gate", "value"))
        gate, value = self.gate(normed, gate), self.value(normed, value)
        product = self.down(self.kernels.multiply_by_gelu_(value, gate), normed)
        self.kernels.add(self._added(convolved, base), product, out, self.threshold)


class KernelBlock(FusedBlock):
    """A block of whole tensors for GPUs, where launching many small slabs would cost more than memory.

    Args:
        kernels: Operations of `kernels.get("triton")`.
    """

    def __init__(self, block: LeanVAEBlock, threshold: float | None, kernels: Kernels):
        self.kernels = kernels
        super().__init__(block, threshold)

    def _prepare(self, conv_weight: torch.Tensor, value: torch.Tensor, gate: torch.Tensor, down: torch.Tensor) -> None:
        self.packed = self.kernels.pack_weight(conv_weight)
        self.up, self.down = torch.stack((value, gate), dim=1).flatten(0, 1), down.contiguous()
        self.limit = None if self.threshold is None else self.bias.new_full((1,), self.threshold)

    def _compute(
        self,
        hidden_states: torch.Tensor,
        tail: torch.Tensor | None,
        keeps_input: bool,
        base: torch.Tensor | None,
        workspace: Workspace,
    ) -> torch.Tensor:
        parameters = (self.packed, self.bias, self.norm_weight, self.norm_bias, self.eps, self.residual)
        convolved, normed = self.kernels.depthwise_conv_residual_norm(hidden_states, tail, *parameters)
        target = convolved if base is None else base
        rows, normed = target.view(-1, target.shape[-1]), normed.view(-1, normed.shape[-1])
        for part in slices(len(rows), SLICES_ON_GPU * self.inner_dim, rows.device):
            hidden = self.kernels.gated_projection(normed[part], self.up)
            if self.residual or base is not None:
                rows[part].addmm_(hidden, self.down.t())
            else:
                torch.mm(hidden, self.down.t(), out=rows[part])
        if self.limit is not None:
            self.kernels.soft_threshold_(target, self.limit)
        return target


def soft_threshold_(x: torch.Tensor, threshold: float) -> None:
    """`sign(x) * relu(|x| - threshold)` in place, without memory of its own where the threshold is not negative."""
    if threshold >= 0:
        torch.ops.aten.softshrink.out(x, threshold, out=x)
    else:  # a threshold is a free parameter of training: below zero values grow, and zero stays zero
        x.add_(torch.sign(x), alpha=-threshold)


def block_maker(kernels: Kernels | SlabKernels | None, prepare_product: PrepareProduct) -> MakeBlock:
    """Return what prepares a block for the kernels that there are."""
    if isinstance(kernels, Kernels):
        return partial(KernelBlock, kernels=kernels)

    def make_block(block: LeanVAEBlock, threshold: float | None) -> FusedBlock:
        if kernels is not None and CppSlabBlock.takes(block):
            return CppSlabBlock(block, threshold, prepare_product, kernels)
        return TorchSlabBlock(block, threshold, prepare_product)

    return make_block


class FusedStack:
    """A chain of blocks; the output of the last one goes through a soft threshold, if there is one."""

    def __init__(self, blocks: LeanVAEBlocks, make_block: MakeBlock, threshold: float | None = None):
        last = len(blocks) - 1
        self.blocks = [make_block(block, threshold if i == last else None) for i, block in enumerate(blocks)]
        self.threshold = threshold

    def __call__(
        self,
        hidden_states: torch.Tensor,
        chunk: Chunk,
        workspace: Workspace,
        keeps_input: bool = False,
        base: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Overwrites `hidden_states`, unless told to keep it, and `base`, which is added to the last output."""
        if not self.blocks:
            hidden_states = hidden_states.clone() if keeps_input else hidden_states
            if self.threshold is not None:
                soft_threshold_(hidden_states, self.threshold)
            return hidden_states if base is None else hidden_states.add_(base)
        for block in self.blocks:
            is_last = block is self.blocks[-1]
            hidden_states = block(hidden_states, chunk, workspace, keeps_input, base if is_last else None)
            keeps_input = False
        return hidden_states
