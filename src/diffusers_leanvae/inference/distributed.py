"""One video over several processes: each computes a share of the exact tiles, all get the whole result.

Every process of a `torch.distributed` group calls the same function with the same arguments. The network's work and
its memory are divided; equal to one process up to float rounding (`tests/test_distributed.py`: 1e-10 in float64).

    torch.distributed.init_process_group()  # torchrun --nproc-per-node 2 ...
    vae.enable_tiling()
    sample = decode_distributed(vae, latents).sample
"""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook

from ..models.autoencoder_kl_leanvae import AutoencoderKLLeanVAE
from ..models.tiling import grid


def encode_distributed(
    vae: AutoencoderKLLeanVAE, x: torch.Tensor, group: "dist.ProcessGroup | None" = None
) -> AutoencoderKLOutput:
    r"""`vae.encode` with its tiles spread over the processes of `group`; without gradients.

    Args:
        vae: The autoencoder, with the same weights and tiling in every process; its tiling must be enabled.
        x: As of `vae.encode`, the same in every process.
        group: The processes that share the work, all of which must call; by default all there are.

    Returns:
        The posterior, `latent_dist`, the same in every process.

    Raises:
        ValueError: If `x` is not legal, tiling is not enabled, or this process does not belong to a group.
    """
    x = x.unsqueeze(2) if x.ndim == 4 else x
    vae._check_sample(x, "x", is_first=True)
    height, width = (size // vae.spatial_compression_ratio for size in x.shape[3:])
    shape = (x.shape[0], 2 * vae.latent_channels, vae.num_latent_frames(x.shape[2]), height, width)
    moments = _share_tiles(vae, x, shape, 1, vae.encoder_halo, vae._encode_tile, group)
    return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments))


def decode_distributed(
    vae: AutoencoderKLLeanVAE, z: torch.Tensor, group: "dist.ProcessGroup | None" = None
) -> DecoderOutput:
    r"""`vae.decode` with its tiles spread over the processes of `group`; without gradients.

    Args:
        vae: The autoencoder, with the same weights and tiling in every process; its tiling must be enabled.
        z: As of `vae.decode`, the same in every process.
        group: The processes that share the work, all of which must call; by default all there are.

    Returns:
        `sample`, the same in every process.

    Raises:
        ValueError: If `z` is not legal, tiling is not enabled, or this process does not belong to a group.
    """
    is_image = z.ndim == 4
    z = z.unsqueeze(2) if is_image else z
    vae._check_latents(z, "z")
    ratio = vae.spatial_compression_ratio
    shape = (z.shape[0], vae.in_channels, vae.num_sample_frames(z.shape[2]), z.shape[3] * ratio, z.shape[4] * ratio)
    sample = _share_tiles(vae, z, shape, ratio, vae.decoder_halo, vae._decode_tile, group)
    return DecoderOutput(sample=sample.squeeze(2) if is_image else sample)


@apply_forward_hook  # an offloaded model comes to its device, as for `vae.encode`
@torch.no_grad()  # no gradient would find its way back to the process that computed a tile
def _share_tiles(
    vae: AutoencoderKLLeanVAE,
    source: torch.Tensor,
    shape: tuple[int, ...],
    scale: int,
    halo: int,
    compute: Callable[..., Iterator[tuple[slice, torch.Tensor]]],
    group: "dist.ProcessGroup | None",
) -> torch.Tensor:
    r"""The result of `shape`, `scale` units per token, of which this process computes every n-th tile."""
    if not vae.use_tiling:
        raise ValueError("`vae` must have tiling enabled, or there is nothing to share: call `vae.enable_tiling()`.")
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            "`group` must be a group of running processes, got none: call `torch.distributed.init_process_group()` "
            "in each, or `vae.encode` and `vae.decode` in a single one."
        )
    rank, num_processes = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError(f"`group` must contain the process that calls, got one without: rank {dist.get_rank()}.")
    kind = source.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else source.dtype
    whole = source.new_empty(shape, dtype=dtype)
    items = [slice(i, i + 1) for i in range(shape[0])] if vae.use_slicing else [slice(None)]
    height, width = shape[3] // scale, shape[4] // scale
    num_latent_frames = shape[2] if scale == 1 else source.shape[2]
    layout: list = [vae._layout(1 if vae.use_slicing else shape[0], num_latent_frames, height, width, None)]
    dist.broadcast_object_list(
        layout, group=group, group_src=0, device=source.device
    )  # what is left of memory may differ among processes
    *size, per_chunk = layout[0]
    tiles = [
        (whole[item, :, :, rows.target(scale), columns.target(scale)], source[item], rows, columns)
        for item in items
        for rows, columns in grid(height, width, size, halo)
    ]
    for target, part, rows, columns in tiles[rank::num_processes]:
        for frames, chunk in compute(part, rows, columns, per_chunk, True, None):
            target[:, :, frames] = chunk
            del chunk  # or it would still be there while the next is computed
    # Each tile is sent by its owner: every process receives each byte it lacks once, and a buffer of one tile is all
    # the memory it takes. A sum of zero-filled results would move everything twice (reduce, then gather), and a gather
    # would hold all tiles a second time, padded to the largest; also, copies keep every bit.
    for number, (target, *_) in enumerate(tiles):
        buffer = target.contiguous()
        dist.broadcast(buffer, group=group, group_src=number % num_processes)
        target.copy_(buffer)
    return whole
