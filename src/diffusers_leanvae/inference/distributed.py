"""One video over several processes: each computes a share of the exact tiles, all get the whole result.

Every process of a `torch.distributed` group calls the same function with the same arguments. The network's work and
its memory are divided; equal to one process up to float rounding (1e-10 in float64, as
`tests/inference/test_distributed.py` checks). Layers that see whole frames, the attention of WF-VAE and IV-VAE at the
latent size, are not divided: they follow or precede the tiles of every chunk in each process.

    torch.distributed.init_process_group()  # torchrun --nproc-per-node 2 ...
    vae.enable_tiling()
    sample = decode_distributed(vae, latents).sample
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook

from ..models.temporal_cache import TemporalCache
from ..models.tiling import Canvas, Tile
from ..models.video_autoencoder import VideoAutoencoder


def encode_distributed(
    vae: VideoAutoencoder, x: torch.Tensor, group: "dist.ProcessGroup | None" = None
) -> AutoencoderKLOutput:
    """`vae.encode` with its tiles spread over the processes of `group`; without gradients.

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
    vae.check_sample(x, "x")
    return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(_share(vae, x, False, group)))


def decode_distributed(
    vae: VideoAutoencoder, z: torch.Tensor, group: "dist.ProcessGroup | None" = None
) -> DecoderOutput:
    """`vae.decode` with its tiles spread over the processes of `group`; without gradients.

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
    vae.check_latents(z, "z")
    sample = _share(vae, z, True, group)
    return DecoderOutput(sample=sample.squeeze(2) if is_image else sample)


class _SharedCanvas(Canvas):
    """A canvas on which each process puts every n-th tile, and which all of them take as a whole.

    Args:
        group: The processes.
        device: Where the result is.
        size: The arguments of a `Canvas`.
    """

    def __init__(self, group: "dist.ProcessGroup | None", device: torch.device, *size: int) -> None:
        super().__init__(*size)
        self.group, self.device = group, device
        self.tiles: list[Tile] = []

    def choose(self, tiles: list[Tile]) -> list[Tile]:
        self.tiles = tiles
        return tiles[dist.get_rank(self.group) :: dist.get_world_size(self.group)]

    def take(self) -> torch.Tensor:
        # The first process has the first tile, and so it knows channels and dtype; others may have no tile.
        about = [None if self._whole is None else (self._whole.shape, self._whole.dtype)]
        dist.broadcast_object_list(about, group=self.group, group_src=0, device=self.device)
        if self._whole is None:
            shape, dtype = about[0]  # type: ignore[misc]
            self._whole = torch.empty(shape, dtype=dtype, device=self.device)
        # Each tile is sent by its owner: every process receives each byte it lacks once, and a buffer of one tile is
        # all the memory it takes. A sum of zero-filled results would move everything twice (reduce, then gather), and
        # a gather would hold all tiles a second time, padded to the largest; also, copies keep every bit.
        for number, tile in enumerate(self.tiles):
            target = tile.place(self._whole, self.scale)
            buffer = target.contiguous()
            dist.broadcast(buffer, group=self.group, group_src=number % dist.get_world_size(self.group))
            target.copy_(buffer)
        return self._whole


@apply_forward_hook  # an offloaded model comes to its device, as for `vae.encode`
@torch.no_grad()  # no gradient would find its way back to the process that computed a tile
def _share(
    vae: VideoAutoencoder, source: torch.Tensor, decode: bool, group: "dist.ProcessGroup | None"
) -> torch.Tensor:
    """The moments or pixels of `source`."""
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
    items = list(source.split(1 if vae.use_slicing else len(source)))
    ratio = 1 if decode else vae.spatial_compression_ratio
    num_latent_frames = source.shape[2] if decode else vae.num_latent_frames(source.shape[2])
    cache = TemporalCache()
    vae.tile_sizes(len(items[0]), num_latent_frames, source.shape[3] // ratio, source.shape[4] // ratio, cache)
    # Those of one process for all: free memory, from which sizes may follow, can differ among processes.
    layouts = [cache.layout]
    dist.broadcast_object_list(layouts, group=group, group_src=0, device=source.device)

    def compute(item: torch.Tensor, make_canvas: Callable[..., Canvas]) -> torch.Tensor:
        cache = TemporalCache(layout=layouts[0])
        cache.is_last = True  # a stream of one piece, which has these tiles
        return (vae.decode_sample if decode else vae.encode_moments)(item, True, cache, make_canvas)

    # Slices go to the processes as a whole while there is one for each. Of the others the tiles are shared.
    num_whole = len(items) // num_processes * num_processes
    own = {index: compute(items[index], Canvas).contiguous() for index in range(rank, num_whole, num_processes)}
    results = [own[index] if index in own else torch.empty_like(own[rank]) for index in range(num_whole)]
    for index, result in enumerate(results):
        dist.broadcast(result, group=group, group_src=index % num_processes)
    make_canvas = partial(_SharedCanvas, group, source.device)
    results += [compute(item, make_canvas) for item in items[num_whole:]]
    return torch.cat(results) if len(results) > 1 else results[0]
