"""Quality of reconstructions and of generated videos: `eval`."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from .. import bundled
from .choices import METRICS, PROTOCOLS, RATE_CODECS, complete
from .common import Device, Dtype, Json, Model, Output, check_file, place, print_json
from .comparison import check_scored, compare_folders, compare_subjects, say_failed, say_missing


def evaluate(
    folder: Annotated[
        str | None,
        typer.Argument(
            metavar="FOLDER",
            help="Folder of videos, of folders of pictures (by protocol), tar files, or a data set as hub:user/name.",
        ),
    ] = None,
    others: Annotated[
        list[str] | None, typer.Argument(metavar="MODEL", help="Further autoencoders for --compare.")
    ] = None,
    model: Model = bundled.DEFAULT,
    output: Output = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help=f"Protocol, which fixes every choice: {', '.join(PROTOCOLS)}, or a .yaml file. Without it "
            "val-17x256.",
            autocompletion=complete(*PROTOCOLS),
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
            help=f"Metric to compute: {', '.join(METRICS)}, or all; repeat it for several. Without it those of the "
            "protocol.",
            autocompletion=complete(*METRICS, "all"),
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
    compare: Annotated[
        list[str] | None,
        typer.Option(
            help="Autoencoders to compare, one after another (--compare A B C): as --model, or any class of "
            "diffusers with a place (AutoencoderKLWan:FOLDER), with random weights (AutoencoderKLWan), or with those "
            "and a config (AutoencoderKLWan:config.json)."
        ),
    ] = None,
    codec: Annotated[
        list[str] | None,
        typer.Option(
            help="Codec to compare with, at the bit rates of the latents stored in 8 bits: "
            f"{', '.join(RATE_CODECS)}; repeat it for several.",
            autocompletion=complete(*RATE_CODECS),
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the report of a comparison: report.html, report.json, report.csv, side_by_side.mp4. "
            "Without it outputs/report."
        ),
    ] = None,
    num_examples: Annotated[int, typer.Option(min=0, help="Clips that the report shows pictures of.")] = 3,
    generated: Annotated[
        str | None,
        typer.Option(help="Folder of generated videos, whose FVD to those of --real is measured; no FOLDER then."),
    ] = None,
    real: Annotated[str | None, typer.Option(help="Folder of real videos, for --generated.")] = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure reconstructions of videos, clip by clip: PSNR (dB), SSIM and more; or FVD of generated videos.

    Files that cannot be read, or are too short, are named, counted and left out of the mean. A metric whose weights or
    programs cannot be had is named, and the others are computed. A run with --output that was ended goes on from there
    when it is started again.

    `torchrun --nproc_per_node N --no-python leanvae eval ...` runs it in N processes, with the same result.
    """
    from ..evaluation.autoencoders import open_for
    from ..evaluation.journal import Journal
    from ..evaluation.measures import KINDS, MetricOptions
    from ..evaluation.protocols import get_protocol, with_sizes
    from ..evaluation.reconstruction import describe_figures, evaluate_reconstruction
    from ..evaluation.reconstructors import AutoencoderReconstructor
    from ..evaluation.streaming import StreamingReconstructor
    from ..launching import is_first_process, leaving_job, num_processes_asked_for, start_accelerator

    if num_processes_asked_for() > 1:
        start_accelerator()
    is_first = is_first_process()
    say = partial(typer.echo, err=as_json)
    default = "val-17x256" if generated is None else "fvd2048_16f"
    chosen = with_sizes(get_protocol(protocol or default), num_frames, size)
    if metric:
        chosen = replace(chosen, metrics=tuple(KINDS) if "all" in metric else tuple(metric))
    options = MetricOptions(vgg16, alexnet, i3d, feature_model)
    check_file("--output", output)
    if generated is not None and real is not None and folder is None:
        if compare or codec or report is not None or chunk is not None:
            raise ValueError("`--compare`, `--codec`, `--report` and `--chunk` must not be given with `--generated`.")
        compare_folders(generated, real, chosen, options, output, device, as_json)
        return
    if folder is None or generated is not None or real is not None:
        raise ValueError("Either FOLDER, or both `--generated` and `--real`, must be given.")
    if compare or codec or report is not None:
        if chunk is not None or output is not None:
            raise ValueError("`--chunk` and `--output` must not be given with a comparison, whose files are --report.")
        names, target = [*(compare or [model]), *(others or [])], report or Path("outputs/report")
        argument = "--compare" if compare else "--model"
        compare_subjects(
            names, codec or [], folder, chosen, options, target, num_examples, device, dtype, as_json, argument
        )
        return
    if others:
        raise ValueError(f"Only one FOLDER must be given without `--compare`, got {' and '.join([folder, *others])}.")
    torch_device, torch_dtype = place(device, dtype)
    vae, about = open_for("--model", model, torch_device, torch_dtype)
    if chunk is None:
        reconstructor = AutoencoderReconstructor(vae, model, about)
    else:
        reconstructor = StreamingReconstructor(vae, model, about, chunk)
    resume = None if output is None else output.with_name(f".{output.name}.clips")
    with leaving_job():
        evaluation = evaluate_reconstruction(
            reconstructor,
            folder,
            chosen,
            options,
            device=torch_device,
            resume=resume,
            progress=say,
        )
    if not is_first:
        return
    say_missing(evaluation)
    say(describe_figures("mean", evaluation.totals, evaluation.metrics))
    say_failed(evaluation)
    if output is not None and resume is not None:
        evaluation.write(output)
        Journal.remove(resume)
        say(str(output))
    if as_json:
        print_json(evaluation.rounded().to_json())
    check_scored([evaluation])
