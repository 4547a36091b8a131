"""Inference with prepared weights: the function of `autoencoder_kl_leanvae.py` with fewer passes over memory.

What `AutoencoderKLLeanVAE.fuse()` prepares, from the stock state dict, which stays as it is:

- wavelet, patch embedding and pixel factor become one linear map of the pixels of a patch, each way: all are linear;
- the gradient step of the first ISTA iteration joins the map that starts it: both are linear in the latents;
- both heads of the encoder are one product;
- blocks are those of `leanvae_fused_blocks.py`.

Tokens are channels-last `(B, t, h, w, c)` and contiguous. Pinned by `tests/models/test_leanvae_fused.py`.
"""

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels import Kernels
from ..kernels.slabs import SlabKernels
from .leanvae_fused_blocks import (
    FusedStack,
    PrepareProduct,
    Workspace,
    block_maker,
    product_dtype,
    same_product,
    slabs,
)
from .temporal_cache import Chunk


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
        prepare_product: Prepares the products of feed-forwards in slabs; another than the default is for experiments.
    """

    def __init__(
        self, vae: Any, kernels: Kernels | SlabKernels | None = None, prepare_product: PrepareProduct = same_product
    ):
        self.signature = signature(vae)
        # Views of some values of each weight, which see most of what is written through `Tensor.data`; comparing them
        # would make a GPU wait, and to sum up all values would be felt with small videos. They hold the memory of the
        # weights, so no others can come to lie there.
        self._samples = [_sample(p) for p in vae.parameters() if p.device.type == "cpu" and is_plain(p) and p.numel()]
        self._values = torch.cat(self._samples) if self._samples else None
        self.dtype = product_dtype(vae.dtype, vae.device)  # of products
        self.ratios = (vae.temporal_compression_ratio, vae.spatial_compression_ratio)
        self.in_channels, self.dims = vae.in_channels, _branch_dims(vae)
        self.separate = vae.encoder.separate
        make_block = block_maker(kernels, prepare_product)
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
        workspace = Workspace(x, self.dtype, self.max_inner_dim)
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
        workspace = Workspace(z, self.dtype, self.max_inner_dim)
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
