"""One video over several processes: each computes a share of the exact tiles, all get the whole result.

Every process of a `torch.distributed` group calls the same function with the same arguments. The network's work and
its memory are divided; equal to one process up to float rounding (1e-10 in float64, as
`tests/inference/test_distributed.py` checks). Layers that see whole frames, the attention of WF-VAE and IV-VAE at the
latent size, are not divided: they follow or precede the tiles of every chunk in each process.

    torch.distributed.init_process_group()  # torchrun --nproc-per-node 2 ...
    vae.enable_tiling()
    sample = decode_distributed(vae, latents).sample
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook

from ..checks import reason_of
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
        ValueError: In every process, if `x` is not legal or tiling not enabled in one of them, or if they differ in
            `x` or slicing; if this process does not belong to a group.
    """
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
        ValueError: In every process, if `z` is not legal or tiling not enabled in one of them, or if they differ in
            `z` or slicing; if this process does not belong to a group.
    """
    sample = _share(vae, z, True, group)
    return DecoderOutput(sample=sample.squeeze(2) if z.ndim == 4 else sample)


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


class _Task(NamedTuple):
    """What a process was called with, of which all must have the same, and the tiles that it would choose."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    use_slicing: bool
    sketch: list[float]
    layout: tuple[int, int, int] | None


def _make_task(vae: VideoAutoencoder, source: torch.Tensor, decode: bool) -> _Task:
    name = "z" if decode else "x"
    vae.check_tensor(source, name)
    source = source.unsqueeze(2) if source.ndim == 4 else source
    (vae.check_latents if decode else vae.check_sample)(source, name)
    if not vae.use_tiling:
        raise ValueError("`vae` must have tiling enabled, or there is nothing to share: call `vae.enable_tiling()`.")
    batch_size, _, length, height, width = source.shape
    ratio = 1 if decode else vae.spatial_compression_ratio
    num_latent_frames = length if decode else vae.num_latent_frames(length)
    num_items = min(batch_size, 1) if vae.use_slicing else batch_size
    cache = TemporalCache()
    vae.tile_sizes(num_items, num_latent_frames, height // ratio, width // ratio, cache)
    return _Task(tuple(source.shape), source.dtype, vae.use_slicing, _sketch(source), cache.layout)


def _sketch(source: torch.Tensor) -> list[float]:
    """Eight random projections of the sums of all rows and columns, and their length, to tell inputs apart by."""
    sums = torch.cat([source.sum(dim=dim, dtype=torch.float32).flatten() for dim in (3, 4)]).cpu()
    weights = torch.randn(8, len(sums), generator=torch.Generator().manual_seed(0))
    return [*(weights @ sums).tolist(), sums.norm().item()]


def _is_near(one: list[float], other: list[float]) -> bool:
    """Tell whether inputs differ by rounding at most, as of kernels that each process chooses: by a hundredth."""
    distance = math.dist(one[:-1], other[:-1]) / math.sqrt(len(one) - 1)
    return distance <= 0.01 * max(one[-1], other[-1]) or str(one) == str(other)  # the latter of NaN


def _agree(name: str, tasks: list[_Task | str]) -> _Task:
    """The task of all processes, where there is one; of one that cannot do its own there is the error instead."""
    first = tasks[0]
    for rank, task in enumerate(tasks):
        if isinstance(task, str):
            everywhere = tasks.count(task) == len(tasks)
            raise ValueError(task if everywhere else f"{reason_of(task)}, in process {rank} of the group.")
    assert isinstance(first, _Task)
    for rank, task in enumerate(tasks):
        assert isinstance(task, _Task)
        for argument, one, other in (
            (name, first.shape, task.shape),
            (name, first.dtype, task.dtype),
            ("use_slicing", first.use_slicing, task.use_slicing),
        ):
            if one != other:
                raise ValueError(
                    f"`{argument}` must be the same in every process, got {one} and {other} in processes 0 and {rank}."
                )
        if not _is_near(first.sketch, task.sketch):
            raise ValueError(
                f"`{name}` must be the same in every process, got other values in processes 0 and {rank}: broadcast "
                "it, or sample it with the same seed."
            )
    return first


@apply_forward_hook  # an offloaded model comes to its device, as for `vae.encode`
@torch.no_grad()  # no gradient would find its way back to the process that computed a tile
def _share(
    vae: VideoAutoencoder, source: torch.Tensor, decode: bool, group: "dist.ProcessGroup | None"
) -> torch.Tensor:
    """The moments or pixels of `source`."""
    task: _Task | str
    try:
        task = _make_task(vae, source, decode)
    except ValueError as error:  # the others must know, or they would wait for this process
        task = str(error)
    if not dist.is_available() or not dist.is_initialized():
        _agree("", [task])
        raise ValueError(
            "`group` must be a group of running processes, got none: call `torch.distributed.init_process_group()` "
            "in each, or `vae.encode` and `vae.decode` in a single one."
        )
    rank, num_processes = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError(f"`group` must contain the process that calls, got one without: rank {dist.get_rank()}.")
    tasks: list[Any] = [task] * num_processes
    device = vae.device if isinstance(task, str) else source.device
    for index in range(num_processes):  # by broadcasts, as gathering takes no device
        about = [task]
        dist.broadcast_object_list(about, group=group, group_src=index, device=device)
        tasks[index] = about[0]
    # The tiles of one process for all: free memory, from which they may follow, can differ among processes.
    layout = _agree("z" if decode else "x", tasks).layout
    source = source.unsqueeze(2) if source.ndim == 4 else source
    items = list(source.split(1 if vae.use_slicing else len(source)))

    def compute(item: torch.Tensor, make_canvas: Callable[..., Canvas]) -> torch.Tensor:
        cache = TemporalCache(layout=layout)
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
