"""One video over several processes: each computes a share of the exact tiles, all get the whole result.

Every process of a `torch.distributed` group calls the same function with the same arguments. The network's work and
its memory are divided; equal to one process up to float rounding (1e-10 in float64, as
`tests/inference/test_distributed.py` checks).

    torch.distributed.init_process_group()  # torchrun --nproc-per-node 2 ...
    vae.enable_tiling()
    sample = decode_distributed(vae, latents).sample
"""

import torch
import torch.distributed as dist
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook

from ..models.video_autoencoder import VideoAutoencoder


def encode_distributed(
    vae: VideoAutoencoder, x: torch.Tensor, group: "dist.ProcessGroup | None" = None
) -> AutoencoderKLOutput:
    """`vae.encode` with its tiles spread over the processes of `group`; without gradients.

    Args:
        vae: A LeanVAE, whose layers are all local in space, with the same weights and tiling in every process; its
            tiling must be enabled.
        x: As of `vae.encode`, the same in every process.
        group: The processes that share the work, all of which must call; by default all there are.

    Returns:
        The posterior, `latent_dist`, the same in every process.

    Raises:
        ValueError: If `x` is not legal, tiling is not enabled, or this process does not belong to a group.
    """
    x = x.unsqueeze(2) if x.ndim == 4 else x
    vae.check_sample(x, "x")
    height, width = (size // vae.spatial_compression_ratio for size in x.shape[3:])
    size = (vae.num_latent_frames(x.shape[2]), height, width)
    moments = _share_tiles(vae, x, (2 * vae.latent_channels, *size), size, False, group)
    return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments))


def decode_distributed(
    vae: VideoAutoencoder, z: torch.Tensor, group: "dist.ProcessGroup | None" = None
) -> DecoderOutput:
    """`vae.decode` with its tiles spread over the processes of `group`; without gradients.

    Args:
        vae: A LeanVAE, whose layers are all local in space, with the same weights and tiling in every process; its
            tiling must be enabled.
        z: As of `vae.decode`, the same in every process.
        group: The processes that share the work, all of which must call; by default all there are.

    Returns:
        `sample`, the same in every process.

    Raises:
        ValueError: If `z` is not legal, tiling is not enabled, or this process does not belong to a group.
    """
    is_image = z.ndim == 4
    z = z.unsqueeze(2) if is_image else z
    vae.check_latents(z, "z")
    ratio = vae.spatial_compression_ratio
    shape = (vae.in_channels, vae.num_sample_frames(z.shape[2]), z.shape[3] * ratio, z.shape[4] * ratio)
    sample = _share_tiles(vae, z, shape, tuple(z.shape[2:]), True, group)
    return DecoderOutput(sample=sample.squeeze(2) if is_image else sample)


@apply_forward_hook  # an offloaded model comes to its device, as for `vae.encode`
@torch.no_grad()  # no gradient would find its way back to the process that computed a tile
def _share_tiles(
    vae: VideoAutoencoder,
    source: torch.Tensor,
    shape: tuple[int, ...],
    latent_size: tuple[int, ...],
    decode: bool,
    group: "dist.ProcessGroup | None",
) -> torch.Tensor:
    """The result, `(batch_size, *shape)`, of which this process computes every n-th tile."""
    vae.check_is_local("decode_distributed" if decode else "encode_distributed")
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
    whole = source.new_empty((len(source), *shape), dtype=dtype)
    items = [slice(i, i + 1) for i in range(len(source))] if vae.use_slicing else [slice(None)]
    num_latent_frames, height, width = latent_size
    sizes = [vae.tile_sizes(1 if vae.use_slicing else len(source), num_latent_frames, height, width)]
    # Those of one process for all: free memory, from which sizes may follow, can differ among processes.
    dist.broadcast_object_list(sizes, group=group, group_src=0, device=source.device)
    compute, scale = (vae.decode_tile, vae.spatial_compression_ratio) if decode else (vae.encode_tile, 1)
    tiles = [
        (tile.place(whole[item], scale), source[item], tile)
        for item in items
        for tile in vae.tiles_of(height, width, sizes[0], decode)
    ]
    for target, part, tile in tiles[rank::num_processes]:
        for frames, chunk in compute(part, tile, sizes[0]):
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
