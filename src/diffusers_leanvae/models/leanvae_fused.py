"""Inference with prepared weights: the function of `autoencoder_kl_leanvae.py` with fewer passes over memory.

What `AutoencoderKLLeanVAE.fuse()` prepares, from the stock state dict, which stays as it is:

- wavelet, patch embedding and pixel factor become one linear map of the pixels of a patch, each way: all are linear;
- the gradient step of the first ISTA iteration joins the map that starts it: both are linear in the latents;
- both heads of the encoder are one product;
- the inner width of a feed-forward is padded with zeros, which change nothing, to one that matrix kernels like;
- a block is computed slab by slab of tokens, in place: convolution, residual, LayerNorm, feed-forward, while the slab
  is in the processor's cache. Slabs go backward in time, so that what a causal convolution reads is not overwritten
  yet, and nothing is concatenated with the state of a stream. Between the matrix products there are as few passes as
  possible, in C++ where it can be compiled.

Tokens are channels-last `(B, t, h, w, c)` and contiguous. Pinned by `tests/models/test_leanvae_fused.py`.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels import Kernels
from ..kernels.slabs import CHANNEL_MULTIPLE, DTYPES, DepthwiseParameters, SlabKernels, pack_taps
from .leanvae_blocks import LeanVAEBlock, LeanVAEBlocks, exchange_tail, slice_elements, slices
from .temporal_cache import Chunk


WIDTH_MULTIPLE = 32  # of inner widths: aligned rows in every dtype, whole tiles of matrix kernels
CPU_SLAB_TOKENS = 1024  # enough rows for full speed of a product, few enough to stay in the cache
SLICES_ON_GPU = 8  # of what `slices` allows: the hidden tensor of some 50,000 tokens of width 512


class Slab(NamedTuple):
    """Tokens that are computed together: whole frames, or rows of one frame."""

    start: int  # first and last time step
    stop: int
    top: int  # first and last row
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
        max_dim: The most channels of a token.

    Attributes:
        num_tokens: Tokens of a slab; a slab of whole rows may have a few more.
    """

    def __init__(self, like: torch.Tensor, dtype: torch.dtype, max_inner_dim: int, max_dim: int):
        limit = slice_elements(like.device) // (2 * max_inner_dim)
        self.num_tokens = min(CPU_SLAB_TOKENS, limit) if like.device.type == "cpu" else limit
        self._buffers = [like.new_empty(0, dtype=kind) for kind in (dtype, dtype, torch.float32, dtype)]
        self._dims = [max_inner_dim, max_inner_dim, max_dim, max_dim]

    def take(self, index: int, num_tokens: int, dim: int) -> torch.Tensor:
        """`(num_tokens, dim)` of a buffer, with anything in it: 0 and 1 are for inner widths, 2 and 3 for tokens.

        All are of the dtype of products, but for 2, which is float32.
        """
        if self._buffers[index].numel() < num_tokens * dim:
            self._buffers[index] = self._buffers[index].new_empty(num_tokens * self._dims[index])
        return self._buffers[index][: num_tokens * dim].view(num_tokens, dim)


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


# Prepares a weight `(columns, inner width)`; the result is called with `x`, and memory that it may use for what it
# returns or not: `x @ weight.T`.
Product = Callable[[torch.Tensor], Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]
MakeBlock = Callable[[Any, float | None], "FusedBlock"]


class FusedBlock:
    """A [`LeanVAEBlock`] with prepared weights; how it is computed, slab by slab or whole, is a subclass's matter.

    Args:
        block: The block; its weights are copied.
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
        vectors = (conv.weight, conv.bias, norm.weight, norm.bias)
        self.conv_weight, self.bias, self.norm_weight, self.norm_bias = (
            x.detach().to(self.dtype)  # type: ignore[union-attr]
            for x in vectors
        )
        self.eps = norm.eps
        inner_dim = block.ff.inner_dim
        self.inner_dim = -(-inner_dim // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        padding = self.inner_dim - inner_dim
        value, gate = (F.pad(half, (0, 0, 0, padding)) for half in up_proj.weight.detach().split(inner_dim))
        self._prepare(value, gate, F.pad(down_proj.weight.detach(), (0, padding)))

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

    def _prepare(self, value: torch.Tensor, gate: torch.Tensor, down: torch.Tensor) -> None:
        """Keep the padded weights of the feed-forward, `(inner, c)` twice and `(c, inner)`, as they are needed."""
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


class SlabBlock(FusedBlock):
    """A block computed slab by slab, in plain PyTorch.

    Args:
        product: What computes the products of the feed-forward.
    """

    def __init__(self, block: LeanVAEBlock, threshold: float | None, product: Product):
        self.product = product
        super().__init__(block, threshold)

    def _prepare(self, value: torch.Tensor, gate: torch.Tensor, down: torch.Tensor) -> None:
        self.taps = [self.conv_weight[:, :, delay].contiguous() for delay in (2, 1, 0)]  # by delay in time
        self.value, self.gate, self.down = (self.product(weight) for weight in (value, gate, down))

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
                self._compute_slab(frames, item_tail, above, slab, added, target[part].view(-1, channels), workspace)
        return target

    def _compute_slab(
        self,
        frames: torch.Tensor,
        tail: torch.Tensor | None,
        above: torch.Tensor | None,
        slab: Slab,
        base: torch.Tensor | None,
        out: torch.Tensor,
        workspace: Workspace,
    ) -> None:
        """Compute `(num_tokens, c)`, a slab of the tokens `(t, h, w, c)`; `above` is the row before it, as it was."""
        convolved = self._convolve(frames, tail, slab, above)
        residual = base if base is not None else convolved if self.residual else None
        self._feed_forward(convolved, residual, out, workspace)

    def _convolve(
        self, frames: torch.Tensor, tail: torch.Tensor | None, slab: Slab, above: torch.Tensor | None
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
        gate, value = (workspace.take(index, len(tokens), self.inner_dim) for index in range(2))
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
    """As [`SlabBlock`], with what lies between the products in C++, in one pass each.

    Args:
        kernels: Of `kernels.slabs.load`.
    """

    def __init__(self, block: LeanVAEBlock, threshold: float | None, product: Product, kernels: SlabKernels):
        self.kernels = kernels
        super().__init__(block, threshold, product)

    @staticmethod
    def takes(block: LeanVAEBlock) -> bool:
        """Tell whether the kernels are for the width and dtype of a block."""
        weight = block.ff.up_proj.weight
        return weight.dtype in DTYPES and weight.shape[1] % CHANNEL_MULTIPLE == 0

    def _prepare(self, value: torch.Tensor, gate: torch.Tensor, down: torch.Tensor) -> None:
        super()._prepare(value, gate, down)
        taps = pack_taps(self.conv_weight)
        vectors = self.bias, self.norm_weight, self.norm_bias
        self.depthwise = DepthwiseParameters(taps, *vectors, eps=self.eps, has_residual=self.residual)

    def _compute_slab(
        self,
        frames: torch.Tensor,
        tail: torch.Tensor | None,
        above: torch.Tensor | None,
        slab: Slab,
        base: torch.Tensor | None,
        out: torch.Tensor,
        workspace: Workspace,
    ) -> None:
        convolved = workspace.take(2, *out.shape)
        normed = workspace.take(3, *out.shape)
        self.kernels.convolve_and_normalize(frames, tail, above, slab, self.depthwise, convolved, normed)
        gate, value = (workspace.take(index, len(out), self.inner_dim) for index in range(2))
        gate, value = self.gate(normed, gate), self.value(normed, value)
        hidden = self.kernels.multiply_by_gelu_(value, gate)
        product = self.down(hidden, normed)
        residual = base if base is not None else convolved if self.residual else None
        self.kernels.add(residual, product, out, self.threshold)


class KernelBlock(FusedBlock):
    """A block of whole tensors for GPUs, where launching many small slabs would cost more than memory.

    Args:
        kernels: Operations of `kernels.get("triton")`.
    """

    def __init__(self, block: LeanVAEBlock, threshold: float | None, kernels: Kernels):
        self.kernels = kernels
        super().__init__(block, threshold)

    def _prepare(self, value: torch.Tensor, gate: torch.Tensor, down: torch.Tensor) -> None:
        self.packed = self.kernels.pack_weight(self.conv_weight)
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
    if threshold >= 0:
        torch.ops.aten.softshrink.out(x, threshold, out=x)
    else:  # a threshold is a free parameter of training: below zero values grow, and zero stays zero
        x.add_(torch.sign(x), alpha=-threshold)


def _block_maker(kernels: Kernels | SlabKernels | None, product: Product) -> MakeBlock:
    """Return what prepares a block for the kernels that there are."""
    if isinstance(kernels, Kernels):
        return partial(KernelBlock, kernels=kernels)

    def make_block(block: LeanVAEBlock, threshold: float | None) -> FusedBlock:
        if kernels is not None and CppSlabBlock.takes(block):
            return CppSlabBlock(block, threshold, product, kernels)
        return SlabBlock(block, threshold, product)

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


class PatchMap(NamedTuple):
    """The linear map between the pixels of a patch and the features of a token.

    Attributes:
        patch: Size of the patch in pixels, `(time, height, width)`.
        weights: Per branch, `(dim, in_channels * time * height * width)` to embed; its transpose's shape to project.
        biases: Per branch to embed; one, of the pixels, to project.
    """

    patch: tuple[int, int, int]
    weights: tuple[torch.Tensor, ...]
    biases: tuple[torch.Tensor, ...]


def _in_float64(module: nn.Module) -> nn.Module:
    """A copy of a module whose patch projections are in float64, and which has nothing else."""
    shell = copy.copy(module)
    projections = {name: layer for name, layer in module._modules.items() if name.endswith("_proj")}
    shell._modules = {name: copy.deepcopy(layer).double() for name, layer in projections.items()}  # type: ignore[union-attr]
    return shell


def _patch_maps(vae: Any, embed: bool) -> list[PatchMap]:
    """Maps of the image token and of video tokens, found by applying the layers to each unit vector."""
    geometry = vae.encoder.geometry
    spatial, temporal = vae.spatial_compression_ratio, vae.temporal_compression_ratio
    device = vae.logvar_proj.weight.device
    dtype = product_dtype(vae.logvar_proj.weight.dtype, device)
    module = _in_float64(vae.encoder if embed else vae.decoder)
    maps = []
    for is_image in (True, False):
        patch = (1 if is_image else temporal, spatial, spatial)
        if embed:
            size = (geometry.in_channels, *patch)
            units = torch.eye(geometry.in_channels * patch[0] * spatial**2, dtype=torch.float64, device=device)
            units = torch.cat((torch.zeros_like(units[:1]), units)).view(-1, *size)
            branches = module._embed(*((units, None) if is_image else (None, units)))  # type: ignore[operator]
            branches = [branch.flatten(0, 3) for branch in branches]  # (1 + inputs, dim) each
            biases = [branch[0] for branch in branches]
            weights = [(branch[1:] - branch[0]).t() for branch in branches]
        else:
            dims = _branch_dims(vae)
            units = torch.eye(sum(dims), dtype=torch.float64, device=device)
            units = torch.cat((torch.zeros_like(units[:1]), units)).view(-1, 1, 1, 1, sum(dims))
            subbands = module._project(units.split(dims, dim=-1), is_image)  # type: ignore[operator]
            pixels = vae.synthesize(subbands).flatten(1)  # (1 + inputs, pixels)
            biases = [pixels[0]]
            weights = [part.t() for part in (pixels[1:] - pixels[0]).split(dims)]
        weights = tuple(weight.to(dtype).contiguous() for weight in weights)
        maps.append(PatchMap(patch, weights, tuple(bias.to(dtype) for bias in biases)))
    return maps


def _branch_dims(vae: Any) -> list[int]:
    dim = vae.logvar_proj.in_features
    return [vae.decoder.low_dim, dim - vae.decoder.low_dim] if vae.decoder.separate else [dim]


def _parts(num_steps: int, is_first: bool) -> list[tuple[int, slice]]:
    """Map that each time step takes: 0 of the image, 1 of the video."""
    parts = [(0, slice(0, 1))] if is_first else []
    return parts + ([(1, slice(int(is_first), num_steps))] if num_steps > int(is_first) else [])


class FusedLeanVAE:
    """Prepared weights of a model, and its encoder and decoder for one chunk of one tile.

    Args:
        vae: The model; nothing of it is changed.
        kernels: Operations of `kernels.get("triton")`, or of `kernels.slabs.load` for slabs, or `None` for slabs of
            plain PyTorch.
        product: Of the feed-forwards in slabs; another than the default is for experiments.
    """

    def __init__(self, vae: Any, kernels: Kernels | SlabKernels | None = None, product: Product = same_product):
        self.signature = signature(vae)
        # Views of some values of each weight, which see what is written through `Tensor.data`; comparing them would
        # make a GPU wait. They hold the memory of the weights, so no others can come to lie there.
        self._samples = [_sample(p) for p in vae.parameters() if p.device.type == "cpu" and is_plain(p) and p.numel()]
        self._values = torch.cat(self._samples) if self._samples else None
        self.dtype = product_dtype(vae.dtype, vae.device)  # of products
        self.ratios = (vae.temporal_compression_ratio, vae.spatial_compression_ratio)
        self.in_channels, self.dims = vae.in_channels, _branch_dims(vae)
        self.separate = vae.encoder.separate
        make_block = _block_maker(kernels, product)
        encoder, decoder, bottleneck = vae.encoder, vae.decoder, vae.bottleneck
        # With LayerNorm inside, the embedding is not linear, and stays as it is.
        self.embedding = None if vae.config["patch_norm"] else _patch_maps(vae, embed=True)
        self.encoder = encoder
        self.projection = _patch_maps(vae, embed=False)
        branches = (encoder.low_layers, encoder.high_layers) if self.separate else ()
        self.encoder_branches = [FusedStack(layers, make_block) for layers in branches]
        self.encoder_fusion = FusedStack(encoder.fusion_layers, make_block)
        self.decoder_fusion = FusedStack(decoder.fusion_layers, make_block)
        branches = (decoder.low_layers, decoder.high_layers) if self.separate else ()
        self.decoder_branches = [FusedStack(layers, make_block) for layers in branches]
        logvar = vae.logvar_proj
        self.iterations: list[tuple[float, FusedStack, FusedStack]] = []
        if vae.config["bottleneck_type"] == "linear":
            compress, expand = bottleneck.compress, bottleneck.expand
            heads, bias = compress.weight, compress.bias
            self.start, self.start_bias = expand.weight.detach(), expand.bias.detach()
        else:
            self.phi = heads = bottleneck.phi.detach()
            bias = torch.zeros_like(logvar.bias)
            self.start, self.start_bias = bottleneck.initial.detach(), None
            for index, iteration in enumerate(bottleneck.iterations):
                step_size, threshold = iteration.step_size.item(), iteration.threshold.item()
                if index == 0:
                    self.start = _first_gradient_step(bottleneck.initial.detach(), self.phi, step_size)
                forward = FusedStack(iteration.forward_transform, make_block, threshold)
                self.iterations.append((step_size, forward, FusedStack(iteration.backward_transform, make_block)))
        self.heads = torch.cat((heads, logvar.weight)).detach()  # (2z, c)
        self.heads_bias = torch.cat((bias, logvar.bias)).detach()
        stacks = [self.encoder_fusion, self.decoder_fusion, *self.encoder_branches, *self.decoder_branches]
        stacks += [stack for iteration in self.iterations for stack in iteration[1:]]
        self.max_inner_dim = max((block.inner_dim for stack in stacks for block in stack.blocks), default=1)

    def is_current(self, vae: Any) -> bool:
        """Tell whether the weights are still those that were prepared."""
        if self.signature != signature(vae):
            return False
        if self._values is None:
            return True
        now, then = (values.view(torch.uint8) for values in (torch.cat(self._samples), self._values))
        return torch.equal(now, then)  # as bytes, since NaN equals nothing

    def encode(self, x: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        """Moments `(B, 2z, t, h, w)` of frames `(B, C, T, H, W)`."""
        workspace = Workspace(x, self.dtype, self.max_inner_dim, sum(self.dims))
        branches = self._embed(x, chunk.is_first, workspace)  # (B, t, h, w, dim) each
        if self.separate:
            stacks = zip(self.encoder_branches, branches, strict=True)
            branches = [stack(part, chunk, workspace) for stack, part in stacks]
        tokens = torch.cat(branches, dim=-1) if len(branches) > 1 else branches[0]
        del branches
        tokens = self.encoder_fusion(tokens, chunk, workspace)
        return F.linear(tokens, self.heads, self.heads_bias).permute(0, 4, 1, 2, 3).contiguous()

    def _embed(self, x: torch.Tensor, is_first: bool, workspace: Workspace) -> list[torch.Tensor]:
        if self.embedding is None:
            image, video = (x[:, :, :1], x[:, :, 1:]) if is_first else (None, x)
            return list(self.encoder._embed(image, video if video.shape[2] else None))
        batch_size, channels, num_frames, height, width = x.shape
        ratio_t, ratio = self.ratios
        size = (-(-num_frames // ratio_t), height // ratio, width // ratio)
        dims = self.dims if self.separate else [sum(self.dims)]
        branches = [x.new_empty(batch_size, *size, dim) for dim in dims]
        for kind, steps in _parts(size[0], is_first):
            (pt, ph, pw), weights, biases = self.embedding[kind]
            frames = x[:, :, :1] if kind == 0 else x[:, :, int(is_first) :]
            for item in range(batch_size):
                for slab in slabs(steps.stop - steps.start, *size[1:], workspace.num_tokens):
                    pixels = frames[item, :, slab.start * pt : slab.stop * pt, slab.top * ph : slab.bottom * ph]
                    pixels = pixels.unflatten(3, (-1, pw)).unflatten(2, (-1, ph)).unflatten(1, (-1, pt))
                    patches = pixels.permute(1, 3, 5, 0, 2, 4, 6).flatten(3).flatten(0, 2)  # (tokens, pixels)
                    for branch, weight, bias in zip(branches, weights, biases, strict=True):
                        out = branch[item, steps][slab.steps, slab.rows].view(len(patches), -1)
                        if out.dtype == weight.dtype:
                            torch.addmm(bias, patches, weight.t(), out=out)
                        else:
                            out.copy_(torch.addmm(bias, patches.to(weight.dtype), weight.t()))
        return branches

    def decode(self, z: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        """Pixels `(B, C, T, H, W)` of latents `(B, z, t, h, w)`."""
        workspace = Workspace(z, self.dtype, self.max_inner_dim, sum(self.dims))
        latents = z.permute(0, 2, 3, 4, 1).contiguous()
        tokens = F.linear(latents, self.start, self.start_bias)  # (B, t, h, w, c)
        for index, (step_size, forward, backward) in enumerate(self.iterations):
            if index > 0:
                self._gradient_step(tokens, latents, step_size)
            sparse = forward(tokens, chunk, workspace, keeps_input=True)
            tokens = backward(sparse, chunk, workspace, base=tokens)
            del sparse
        tokens = self.decoder_fusion(tokens, chunk, workspace)
        branches = [part.contiguous() for part in tokens.split(self.dims, dim=-1)]
        del tokens
        if self.separate:
            stacks = zip(self.decoder_branches, branches, strict=True)
            branches = [stack(part, chunk, workspace) for stack, part in stacks]
        return self._project(branches, chunk.is_first, workspace)

    def _gradient_step(self, tokens: torch.Tensor, latents: torch.Tensor, step_size: float) -> None:
        flat = tokens.view(-1, tokens.shape[-1])
        error = F.linear(flat, self.phi).sub_(latents.view(-1, latents.shape[-1]))
        flat.addmm_(error, self.phi, alpha=-step_size)

    def _project(self, branches: list[torch.Tensor], is_first: bool, workspace: Workspace) -> torch.Tensor:
        batch_size, num_steps, height, width, _ = branches[0].shape
        ratio_t, ratio = self.ratios
        num_frames = num_steps * ratio_t - (ratio_t - 1) * int(is_first)
        sample = branches[0].new_empty(batch_size, self.in_channels, num_frames, height * ratio, width * ratio)
        for kind, steps in _parts(num_steps, is_first):
            (pt, ph, pw), weights, (bias,) = self.projection[kind]
            frames = sample[:, :, :1] if kind == 0 else sample[:, :, int(is_first) :]
            for item in range(batch_size):
                for slab in slabs(steps.stop - steps.start, height, width, workspace.num_tokens):
                    pixels = bias
                    for branch, weight in zip(branches, weights, strict=True):
                        tokens = branch[item, steps][slab.steps, slab.rows].flatten(0, 2)
                        pixels = torch.addmm(pixels, tokens.to(weight.dtype), weight.t())  # (tokens, pixels)
                    shape = (slab.stop - slab.start, slab.bottom - slab.top, width, self.in_channels, pt, ph, pw)
                    out = frames[item, :, slab.start * pt : slab.stop * pt, slab.top * ph : slab.bottom * ph]
                    out = out.unflatten(3, (-1, pw)).unflatten(2, (-1, ph)).unflatten(1, (-1, pt))
                    out.copy_(pixels.view(shape).permute(3, 0, 4, 1, 5, 2, 6))
        return sample


def _first_gradient_step(initial: torch.Tensor, phi: torch.Tensor, step_size: float) -> torch.Tensor:
    """`(c, z)`: initial estimate and first gradient step as one linear map of the latents."""
    start, sensing = initial.double(), phi.double()
    error = sensing @ start - torch.eye(len(phi), dtype=torch.float64, device=phi.device)  # of the estimate, sensed
    return (start - step_size * sensing.t() @ error).to(initial.dtype)


def signature(module: nn.Module) -> tuple:
    """Changes whenever a parameter is moved, cast, loaded, trained or quantized."""
    parameters = module.parameters()
    return tuple(
        (p.data_ptr(), p.dtype, p.device, 0 if p.is_inference() else p._version) if is_plain(p) else None
        for p in parameters
    )


def _sample(parameter: nn.Parameter) -> torch.Tensor:
    """View up to four values of a parameter, whatever its layout."""
    count = min(parameter.numel(), 4)
    step = (parameter.numel() - 1) // max(count - 1, 1)
    return parameter.detach().as_strided((count,), (step,))


def is_plain(parameter: nn.Parameter) -> bool:
    """Tell whether a parameter is numbers in memory, and no subclass that quantizes or distributes them."""
    return type(parameter) is nn.Parameter
