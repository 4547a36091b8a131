"""Quality of reconstructions: `eval`."""

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from .. import bundled
from .common import Device, Dtype, Model, Output, place


if TYPE_CHECKING:
    from ..evaluation.protocols import Protocol


def evaluate(
    folder: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER",
            help="Folder of videos, of folders of pictures (by protocol), tar files, or a data set as hub:user/name.",
        ),
    ],
    model: Model = bundled.DEFAULT,
    output: Output = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="Protocol, which fixes every choice: val-17x256, davis-17x256, ucf101-17x256, fvd2048_16f, or a "
            ".yaml file. Without it val-17x256."
        ),
    ] = None,
    num_frames: Annotated[
        int | None, typer.Option(min=1, help="Frames of each clip, in place of those of the protocol.")
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(min=8, help="Side of the clips in pixels, in place of that of the protocol."),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="Metric to compute: psnr, psnr_in_group, ssim, ms_ssim, lpips_vgg16, lpips_alexnet, rfvd_i3d, "
            "rfvd_features, vmaf, xpsnr, flicker, warp, or all; repeat it for several. Without it those of the "
            "protocol."
        ),
    ] = None,
    chunk: Annotated[
        int | None,
        typer.Option(
            min=1, help="Reconstruct in pieces of so many frames, which takes less memory. Without it whole."
        ),
    ] = None,
    vgg16: Annotated[
        str | None,
        typer.Option(
            help="VGG16 for LPIPS: a file of torchvision's weights, a Hub id, or seed:0 for random weights. Without "
            "it timm/vgg16.tv_in1k."
        ),
    ] = None,
    alexnet: Annotated[
        str | None, typer.Option(help="AlexNet for LPIPS: a file of torchvision's weights, or seed:0.")
    ] = None,
    i3d: Annotated[str | None, typer.Option(help="I3D for FVD: the torchscript file of StyleGAN-V.")] = None,
    feature_model: Annotated[
        str | None,
        typer.Option(help="Vision model of transformers for FVD in place of I3D: a folder or a Hub id."),
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
) -> None:
    """Measure reconstructions of videos, clip by clip: PSNR (dB), SSIM and more.

    Files that cannot be read, or are too short, are named, counted and left out of the mean. A metric whose weights or
    programs cannot be had is named, and the others are computed. A run with --output that was ended goes on from there
    when it is started again.

    `torchrun --nproc_per_node N --no-python leanvae eval ...` runs it in N processes, with the same result.
    """
    import torch.distributed as dist

    from ..evaluation.autoencoders import open_autoencoder
    from ..evaluation.journal import Journal
    from ..evaluation.measures import KINDS, MetricOptions
    from ..evaluation.protocols import get_protocol
    from ..evaluation.reconstruction import describe_figures, evaluate_reconstruction
    from ..evaluation.reconstructors import AutoencoderReconstructor
    from ..evaluation.streaming import StreamingReconstructor
    from ..launching import start_accelerator

    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        start_accelerator()
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    chosen = _change(get_protocol(protocol or "val-17x256"), num_frames, size)
    if metric:
        chosen = replace(chosen, metrics=tuple(KINDS) if "all" in metric else tuple(metric))
    torch_device, torch_dtype = place(device, dtype)
    vae, about = open_autoencoder(model, torch_device, torch_dtype)
    if chunk is None:
        reconstructor = AutoencoderReconstructor(vae, model, about)
    else:
        reconstructor = StreamingReconstructor(vae, model, about, chunk)
    resume = None if output is None else output.with_name(f".{output.name}.clips")
    try:
        evaluation = evaluate_reconstruction(
            reconstructor,
            folder,
            chosen,
            MetricOptions(vgg16, alexnet, i3d, feature_model),
            device=torch_device,
            resume=resume,
            progress=typer.echo,
        )
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if not is_first:
        return
    for name, reason in evaluation.missing.items():
        typer.echo(f"left out: {name}: {reason}", err=True)
    typer.echo(describe_figures("mean", evaluation.totals, evaluation.metrics))
    if evaluation.failed:
        total = len(evaluation.failed) + evaluation.num_videos
        typer.echo(f"{len(evaluation.failed)} of {total} files failed: {', '.join(evaluation.failed)}", err=True)
    if output is not None and resume is not None:
        evaluation.write(output)
        Journal.remove(resume)
        typer.echo(str(output))


def _change(protocol: "Protocol", num_frames: int | None, size: int | None) -> "Protocol":
    """Change sizes of a protocol, which is then called after them."""
    changed = replace(protocol, num_frames=num_frames or protocol.num_frames, resolution=size or protocol.resolution)
    if changed == protocol:
        return protocol
    return replace(changed, name=f"{protocol.name} at {changed.num_frames}x{changed.resolution}")
