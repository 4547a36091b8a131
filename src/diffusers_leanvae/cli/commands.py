"""`leanvae` on the command line: videos to latents and back, folders and streams, evaluation, benchmarks."""

import json
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm.auto import tqdm

from .. import bundled
from .._version import __version__
from ..checks import CHECKPOINT_SUFFIXES, DTYPES, parse_dtype
from ..conversion import latte, leanvae
from ..evaluation.results import sha256, write_result
from ..inference import files
from ..loading import family_of_checkpoint, family_of_class, load_autoencoder
from ..models.autoencoder_kl_leanvae import AutoencoderKLLeanVAE
from ..models.transformer_latte import LeanVAELatteTransformer3DModel
from ..video_io import list_videos, probe_video
from ..video_io.reader import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="LeanVAE video autoencoder: videos to latents and back, any length, any size.",
)

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"

DTYPE_NAMES = ", ".join(f"{name} ({short})" for name, short in DTYPES.items())

Model = Annotated[
    str,
    typer.Option(
        help=f"A bundled model ({', '.join(bundled.MODELS)}), a folder, an original checkpoint file, or a Hub id "
        "(user/repo, or user/repo/file.ckpt for original weights)."
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; auto takes a GPU if there is one.")]
Dtype = Annotated[str, typer.Option(help=f"{DTYPE_NAMES}; auto is bfloat16 on CUDA, else float32.")]
Start = Annotated[int, typer.Option(min=0, help="First frame.")]
NumFrames = Annotated[int | None, typer.Option(min=1, help="Frames to take; all by default.")]
Size = Annotated[str | None, typer.Option(help="Resize first: a short side (256) or WIDTHxHEIGHT (640x360).")]
Crf = Annotated[float, typer.Option(min=0, max=51, help="Quality of written H.264, lower is better.")]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        help="Most to use above the weights, such as 2GiB or 800MiB: smaller steps and tiles, same pixels; state on "
        "disk beside OUT where needed."
    ),
]
Fuse = Annotated[
    bool,
    typer.Option("--fuse", help="Prepared weights: faster, the same up to rounding; takes the weights' memory twice."),
]
Overwrite = Annotated[bool, typer.Option(help="In a folder job, redo outputs that exist already.")]


class CommandError(Exception):
    r"""A sentence for the user; becomes `error: ...` and exit status 1."""


def _place(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    r"""Device and dtype of the options `--device` and `--dtype`."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    torch_dtype = parse_dtype("--dtype", dtype)
    try:
        torch_device = torch.device(device)
        torch.empty(0, device=torch_device)
    except (RuntimeError, AssertionError):
        raise CommandError(f"`--device` must be a device of this machine, got {device!r}.") from None
    return torch_device, torch_dtype


def load_model(name: str, device: str = "auto", dtype: str = "auto", fuse: bool = False) -> Any:
    r"""The autoencoder of a `--model` argument, ready for inference."""
    torch_device, torch_dtype = _place(device, dtype)
    try:
        vae = load_autoencoder(bundled.model_path(name) if name in bundled.MODELS else name, torch_dtype)
    except (OSError, ValueError) as error:
        raise CommandError(f"`--model` {name!r} cannot be loaded: {_first_sentence(error)}") from None
    vae = vae.to(torch_device).eval()
    if fuse:
        if not isinstance(vae, AutoencoderKLLeanVAE):
            raise CommandError(f"`--fuse` needs a LeanVAE, got `--model` {name!r}, an {type(vae).__name__}.")
        vae.fuse()
    return vae


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


def _run(command: Callable[[], Any]) -> Any:
    r"""Run, and turn every error that a user can cause into one sentence."""
    try:
        return command()
    except (CommandError, ValueError, OSError) as error:
        typer.echo(f"error: {_first_sentence(error)}", err=True)
        raise typer.Exit(1) from None
    except torch.OutOfMemoryError:
        typer.echo("error: out of memory; try `--max-memory`, a smaller `--size`, or `--dtype bfloat16`.", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(130) from None


def _jobs(source: Path, target: Path, find: Callable[[Path], list[Path]], suffix: Callable[[Path], str]):
    r"""The (input, output) pairs of a file or folder."""
    if not source.exists():
        raise CommandError(f"the input must exist, got {str(source)!r}.")
    if not source.is_dir():
        if target.is_dir():
            target = target / source.with_suffix(suffix(source)).name
        return [(source, target)]
    if target.exists() and not target.is_dir():
        raise CommandError(f"the output must be a folder when the input is one, got {str(target)!r}.")
    found = find(source)
    if not found:
        raise CommandError(f"the input folder must hold at least one usable file, got none in {str(source)!r}.")
    return [(path, target / path.relative_to(source).with_suffix(suffix(path))) for path in found]


def _process(
    jobs: list[tuple[Path, Path]], overwrite: bool, work: Callable[[Path, Path, files.Progress], Any]
) -> None:
    r"""Do every job; in a folder go on past a bad file, skip what is finished, and fail at the end."""
    failures = []
    is_folder = len(jobs) > 1
    for number, (source, target) in enumerate(jobs, start=1):
        if is_folder and target.exists() and not overwrite:
            typer.echo(f"{source}: done already, skipped ({target})", err=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        description = f"[{number}/{len(jobs)}] {source.name}" if is_folder else source.name
        with tqdm(desc=description, unit=" frames", disable=not sys.stderr.isatty(), leave=False) as bar:
            try:
                work(source, target, bar.update)
            except (ValueError, OSError) as error:
                if not is_folder:
                    raise
                failures.append(source)
                typer.echo(f"error: {_first_sentence(error)}", err=True)
    if failures:
        raise CommandError(f"{len(failures)} of {len(jobs)} files failed: {', '.join(map(str, failures))}")


@app.command()
def reconstruct(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Video, image, or folder of them.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Video or image to write, or folder.")],
    model: Model = bundled.DEFAULT,
    side_by_side: Annotated[bool, typer.Option(help="Original to the left, reconstruction to the right.")] = False,
    metrics: Annotated[bool, typer.Option(help="Print PSNR and SSIM of each clip.")] = False,
    start: Start = 0,
    num_frames: NumFrames = None,
    size: Size = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    fuse: Fuse = False,
    max_memory: MaxMemory = None,
    crf: Crf = 16,
    overwrite: Overwrite = False,
) -> None:
    """Encode and decode videos: what the autoencoder keeps of them."""

    def command() -> None:
        jobs = _jobs(source, target, list_videos, files.default_suffix)
        limit = None if max_memory is None else files.parse_memory(max_memory)
        vae = load_model(model, device, dtype, fuse)

        def work(path: Path, output: Path, progress: files.Progress) -> None:
            summary = files.reconstruct_video(
                vae,
                path,
                output,
                start=start,
                num_frames=num_frames,
                size=size,
                side_by_side=side_by_side,
                metrics=metrics,
                max_memory=limit,
                progress=progress,
                crf=crf,
            )
            line = f"{output}  {summary['width']}x{summary['height']}  {summary['num_frames']} frames"
            if metrics:
                psnr, ssim = summary["psnr_frame_mean_rgb"], summary["ssim_frame_mean_rgb"]
                line += f"  PSNR {psnr:.2f} dB  SSIM {ssim:.4f}"
            typer.echo(line)

        _process(jobs, overwrite, work)

    _run(command)


@app.command()
def encode(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Video, image, or folder of them.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Latents to write (.safetensors), or folder.")],
    model: Model = bundled.DEFAULT,
    start: Start = 0,
    num_frames: NumFrames = None,
    size: Size = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    fuse: Fuse = False,
    max_memory: MaxMemory = None,
    overwrite: Overwrite = False,
) -> None:
    """Encode videos to latents (posterior means, not normalised) in safetensors files."""

    def command() -> None:
        jobs = _jobs(source, target, list_videos, lambda _: ".safetensors")
        limit = None if max_memory is None else files.parse_memory(max_memory)
        vae = load_model(model, device, dtype, fuse)

        def work(path: Path, output: Path, progress: files.Progress) -> None:
            info = files.encode_video(
                vae,
                path,
                output,
                model=model,
                start=start,
                num_frames=num_frames,
                size=size,
                max_memory=limit,
                progress=progress,
            )
            typer.echo(f"{output}  {info.width}x{info.height}  {info.num_frames} frames")

        _process(jobs, overwrite, work)

    _run(command)


@app.command()
def decode(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Latents of `leanvae encode`, or folder of them.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Video or image to write, or folder.")],
    model: Annotated[str | None, typer.Option(help="Autoencoder; by default the one that encoded the file.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    fuse: Fuse = False,
    max_memory: MaxMemory = None,
    crf: Crf = 16,
    overwrite: Overwrite = False,
) -> None:
    """Decode latents to videos of the original size, length and frame rate."""

    def suffix(path: Path) -> str:
        try:
            with files.open_latents(path) as (_, info):
                return ".png" if info.is_image else ".mp4"
        except ValueError:
            return ".mp4"  # the job itself will say what is wrong with the file

    def command() -> None:
        jobs = _jobs(source, target, lambda folder: sorted(folder.rglob("*.safetensors")), suffix)
        limit = None if max_memory is None else files.parse_memory(max_memory)
        loaded: dict[str, Any] = {}

        def work(path: Path, output: Path, progress: files.Progress) -> None:
            with files.open_latents(path) as (_, info):
                name = model or info.model
            if name not in loaded:
                loaded.clear()  # one model in memory at a time
                loaded[name] = load_model(name, device, dtype, fuse)
            files.decode_video(loaded[name], path, output, max_memory=limit, progress=progress, crf=crf)
            typer.echo(f"{output}  {info.width}x{info.height}  {info.num_frames} frames")

        _process(jobs, overwrite, work)

    _run(command)


@app.command("encode-dataset")
def encode_dataset(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Folder of videos, tar shards, stream (hub:user/name), named data set (ucf101:FOLDER), or shapes.",
        ),
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of latents to write, or to go on with.")],
    model: Model = bundled.DEFAULT,
    clip_size: Annotated[str, typer.Option(help="FRAMESxHEIGHTxWIDTH of a clip.")] = "17x256x256",
    num_crops: Annotated[int, typer.Option(min=1, help="Clips per video.")] = 1,
    flip: Annotated[
        str, typer.Option(help="none, random, both; auto is what is usual for a named data set.")
    ] = "auto",
    sampling: Annotated[str, typer.Option(help="Of named data sets: exact, or reference as published.")] = "exact",
    stride: Annotated[
        int | None, typer.Option(min=1, help="Distance of frames; 3 for named data sets, else 1.")
    ] = None,
    short_side: Annotated[int | None, typer.Option(min=1, help="Scale larger videos down to it first.")] = None,
    num_clips: Annotated[int | None, typer.Option(min=1, help="At most so many clips; streams need it.")] = None,
    seed: Annotated[int, typer.Option(help="What is cut follows from it.")] = 0,
    save_dtype: Annotated[str, typer.Option(help="Of the stored latents: float32 or float16.")] = "float32",
    file_format: Annotated[str, typer.Option(help="safetensors or webdataset.")] = "safetensors",
    shard_size: Annotated[int, typer.Option(min=1, help="Clips per file.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Clips encoded at once.")] = 8,
    num_workers: Annotated[int, typer.Option(min=0, help="Processes that decode ahead.")] = 0,
    dtype: Dtype = "float32",
    device: Device = "auto",
) -> None:
    """Encode a data set to latents for diffusion; goes on where it was. Several processes: `torchrun --no-python`."""
    import torch.distributed as dist

    from ..data.latent_cache import encode_dataset as encode_clips

    def command() -> None:
        sizes = clip_size.split("x")
        if len(sizes) != 3 or not all(size.isdecimal() for size in sizes):
            raise CommandError(f"`--clip-size` must be FRAMESxHEIGHTxWIDTH such as 17x256x256, got {clip_size!r}.")
        vae = load_model(model, device, dtype)
        with tqdm(unit=" clips", disable=not sys.stderr.isatty(), leave=False) as bar:
            latents = encode_clips(
                vae,
                source,
                target,
                clip_size=[int(size) for size in sizes],
                num_crops=num_crops,
                flip=flip,  # type: ignore[arg-type]
                sampling=sampling,  # type: ignore[arg-type]
                stride=stride,
                short_side=short_side,
                num_clips=num_clips,
                seed=seed,
                dtype=save_dtype,
                file_format=file_format,  # type: ignore[arg-type]
                shard_size=shard_size,
                batch_size=batch_size,
                num_workers=num_workers,
                progress=bar.update,
            )
        if not dist.is_initialized() or dist.get_rank() == 0:
            shape = " x ".join(str(edge) for edge in latents.index["shape"])
            typer.echo(f"{target}  {len(latents)} latents of {shape}  {latents.index['num_skipped']} clips skipped")
        if dist.is_initialized():
            dist.destroy_process_group()

    _run(command)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="Original checkpoint or Hub file; a model folder back.")],
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help="Model folder to write; a .ckpt or .safetensors back.")
    ],
    to_original: Annotated[bool, typer.Option(help="From a diffusers folder to the original layout.")] = False,
    dtype: Annotated[str | None, typer.Option(help=f"Cast the weights: {DTYPE_NAMES}.")] = None,
    pixel_factor: Annotated[
        float | None, typer.Option(help="1.0 for weights trained on [-1, 1] (Wan-aligned); as stored by default.")
    ] = None,
    num_attention_heads: Annotated[
        int | None, typer.Option(help="Heads of a Latte checkpoint of none of the sizes S, B, L, XL.")
    ] = None,
) -> None:
    """Convert original LeanVAE, WF-VAE, IV-VAE and Latte checkpoints to diffusers folders, and back.

    Bit-equal without --dtype.
    """

    def command() -> None:
        torch_dtype = None if dtype is None else parse_dtype("--dtype", dtype)
        if to_original:
            if target.suffix not in CHECKPOINT_SUFFIXES:
                raise CommandError(f"OUT must end in {', '.join(CHECKPOINT_SUFFIXES)}, got {str(target)!r}.")
            path = bundled.model_path(source) if source in bundled.MODELS else source
            config: Any = AutoencoderKLLeanVAE.load_config(path)
            is_latte = config.get("_class_name") == LeanVAELatteTransformer3DModel.__name__
            model_class, layout = (
                (LeanVAELatteTransformer3DModel, latte) if is_latte else family_of_class(config.get("_class_name"))
            )
            model = model_class.from_pretrained(path, torch_dtype=torch_dtype)
            target.parent.mkdir(parents=True, exist_ok=True)
            layout.write_original_checkpoint(target, dict(model.config), model.state_dict())
        else:
            if target.suffix in CHECKPOINT_SUFFIXES:
                raise CommandError(f"OUT must be a folder without `--to-original`, got {str(target)!r}.")
            file = leanvae.resolve_checkpoint(source)
            is_latte = latte.is_original_checkpoint(file)
            options = {"pixel_factor": pixel_factor, "num_attention_heads": num_attention_heads}
            options = {name: value for name, value in options.items() if value is not None}
            model_class = LeanVAELatteTransformer3DModel if is_latte else family_of_checkpoint(file).model_class
            takes = {LeanVAELatteTransformer3DModel: {"num_attention_heads"}, AutoencoderKLLeanVAE: {"pixel_factor"}}
            foreign = options.keys() - takes.get(model_class, set())
            if foreign:
                name, kind = foreign.pop().replace("_", "-"), getattr(model_class, "_original_name", "Latte")
                raise CommandError(f"`--{name}` must not be given for a checkpoint of {kind}.")
            model = model_class.from_single_file(file, torch_dtype=torch_dtype, **options)
            model.save_pretrained(target)
        typer.echo(f"{target}  {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")

    _run(command)


@app.command()
def info(path: Annotated[str, typer.Argument(help="Video, image, latents file, model folder or checkpoint.")]) -> None:
    """Print what a file or model is, as JSON."""

    def command() -> None:
        suffix = Path(path).suffix.lower()
        if Path(path).is_file() and suffix in VIDEO_EXTENSIONS + IMAGE_EXTENSIONS:
            described: dict[str, Any] = {"kind": "video", **vars(probe_video(path))}
        elif Path(path).is_file() and suffix == ".safetensors" and _is_latents(path):
            with files.open_latents(path) as (latents, latents_info):
                shape, kind = list(latents.get_shape()), str(latents.get_dtype())
            described = {"kind": "latents", "shape": shape, "dtype": kind, **vars(latents_info)}
        else:
            vae = load_model(path, "cpu", "float32")
            described = {
                "kind": "model",
                "class": type(vae).__name__,
                "num_parameters": sum(p.numel() for p in vae.parameters()),
                "temporal_compression_ratio": vae.temporal_compression_ratio,
                "spatial_compression_ratio": vae.spatial_compression_ratio,
                "config": {key: value for key, value in vae.config.items() if not key.startswith("_")},
            }
        typer.echo(json.dumps(described, indent=2, default=str))

    _run(command)


def _is_latents(path: str) -> bool:
    try:
        with files.open_latents(path):
            return True
    except ValueError:
        return False


@app.command()
def live(
    width: Annotated[int, typer.Option(min=1, help="Width of the frames in pixels.")],
    height: Annotated[int, typer.Option(min=1, help="Height of the frames in pixels.")],
    model: Model = bundled.DEFAULT,
    num_frames_per_step: Annotated[int, typer.Option(min=4, help="Fewer: earlier; more: faster.")] = 4,
    side_by_side: Annotated[bool, typer.Option(help="Original to the left, reconstruction to the right.")] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    fuse: Fuse = False,
) -> None:
    """Raw RGB24 frames from standard input, reconstructed, to standard output as they come."""
    from ..inference.live import reconstruct_stream

    def command() -> None:
        vae = load_model(model, device, dtype, fuse)
        # Unbuffered: frames leave at once, and a reader that went away is noticed here and not when Python ends.
        with open(sys.stdout.fileno(), "wb", buffering=0, closefd=False) as target:
            count = reconstruct_stream(
                vae,
                sys.stdin.buffer,
                target,
                width,
                height,
                num_frames_per_step=num_frames_per_step,
                side_by_side=side_by_side,
            )
        typer.echo(f"{count} frames", err=True)

    _run(command)


@app.command("eval")
def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of videos.")],
    model: Model = bundled.DEFAULT,
    output: Annotated[Path | None, typer.Option(help="JSON file for the result and where it was measured.")] = None,
    num_frames: Annotated[int, typer.Option(min=1, help="Frames of each clip.")] = 17,
    size: Annotated[int, typer.Option(min=8, help="Short side, and side of the centre crop.")] = 256,
    dtype: Dtype = "float32",
    device: Device = "auto",
) -> None:
    """PSNR and SSIM of reconstructions over a folder of videos, clip by clip."""
    from ..evaluation.reconstruction import evaluate_reconstruction

    def command() -> None:
        if not folder.is_dir():
            raise CommandError(f"FOLDER must be an existing folder, got {str(folder)!r}.")
        vae = load_model(model, device, dtype)
        result = evaluate_reconstruction(vae, folder, num_frames, size, typer.echo)
        psnr, ssim = result["psnr_frame_mean_rgb"], result["ssim_frame_mean_rgb"]
        typer.echo(f"{'mean':<28} PSNR {psnr:6.2f} dB  SSIM {ssim:.4f}")
        if output is not None:
            weights = (bundled.model_path(model) if model in bundled.MODELS else Path(model)) / WEIGHTS_NAME
            checksum = sha256(weights) if weights.is_file() else None
            described = {
                "model": model,
                "weights_sha256": checksum,
                "num_parameters": sum(p.numel() for p in vae.parameters()),
                "latent_channels": vae.latent_channels,
                "dataset": folder.name,
            }
            write_result(output, described | result)
            typer.echo(str(output))

    _run(command)


@app.command()
def generate(
    output: Annotated[
        Path, typer.Option(help="Video to write, several in a grid; or a folder, one file for each.")
    ] = Path("outputs/generated.mp4"),
    model: Annotated[
        str, typer.Option(help=f"Pipeline: {', '.join(bundled.PIPELINES)} (bundled), a folder, or a Hub id.")
    ] = next(iter(bundled.PIPELINES)),
    label: Annotated[
        list[str] | None, typer.Option(help="Class, by name or id; repeat it for several. Random classes without it.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Text, for text-to-video; repeat it for several.")] = None,
    image: Annotated[Path | None, typer.Option(help="Picture that the videos begin with.")] = None,
    num_videos: Annotated[
        int | None, typer.Option(min=1, help="Videos in all; one for each label or prompt by default.")
    ] = None,
    num_frames: Annotated[int | None, typer.Option(min=1, help="Frames of each; as trained by default.")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Height in pixels; as trained by default.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Width in pixels; as trained by default.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the sampler.")] = 50,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            help="Classifier-free guidance; 1 is none. By default the pipeline's, or what suits a bundled one."
        ),
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="ddpm, ddim or dpm++ for diffusion models, flow; the pipeline's own without it.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first video; the next has the next.")] = 0,
    fps: Annotated[float, typer.Option(help="Frames per second of what is written.")] = 8,
    batch_size: Annotated[int, typer.Option(min=1, help="Videos at once; no video depends on it.")] = 4,
    dtype: Dtype = "auto",
    device: Device = "auto",
    max_memory: Annotated[
        str | None, typer.Option(help="Most that decoding may use above the weights, such as 2GiB: same pixels.")
    ] = None,
    crf: Crf = 16,
) -> None:
    """Generate videos of a class or of a text by a diffusion pipeline on LeanVAE latents."""
    from diffusers.utils import logging

    from ..generation.videos import generate_videos

    def command() -> None:
        if not sys.stderr.isatty():
            logging.disable_progress_bar()
        limit = None if max_memory is None else files.parse_memory(max_memory)
        torch_device, torch_dtype = _place(device, dtype)
        written = generate_videos(
            model,
            output,
            labels=label or None,
            prompts=prompt or None,
            image=image,
            num_videos=num_videos,
            scheduler=scheduler,
            num_inference_steps=steps,
            seed=seed,
            batch_size=batch_size,
            device=torch_device,
            dtype=torch_dtype,
            max_memory=limit,
            fps=fps,
            crf=crf,
            show_progress=sys.stderr.isatty(),
            num_frames=num_frames,
            height=height,
            width=width,
            guidance_scale=guidance_scale,
        )
        for path in written:
            typer.echo(path)

    _run(command)


@app.command()
def bench(
    model: Annotated[
        str, typer.Option(help="As in other commands, or LeanVAE-16ch, LeanVAE-4ch: full size, random weights.")
    ] = bundled.DEFAULT,
    size: Annotated[list[str] | None, typer.Option(help="FRAMESxHEIGHTxWIDTH; may be repeated [17x256x256].")] = None,
    variant: Annotated[
        list[str] | None, typer.Option(help="eager, fused, compiled, int8, graphs; may be repeated [eager, fused].")
    ] = None,
    peer: Annotated[
        list[str] | None, typer.Option(help="An autoencoder of diffusers, such as AutoencoderKLWan; may be repeated.")
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="As in other commands; may be repeated [auto].")] = None,
    threads: Annotated[list[int] | None, typer.Option(min=1, help="CPU threads; may be repeated [all].")] = None,
    repeats: Annotated[int, typer.Option(min=0, help="Calls after the first.")] = 7,
    budget: Annotated[float, typer.Option(min=0, help="Seconds for each row; slow models repeat less.")] = 60.0,
    output: Annotated[Path | None, typer.Option(help="JSON file for the result and where it was measured.")] = None,
    device: Device = "auto",
) -> None:
    """Time, memory, work and time over the matrix-product floor; JSON in the last line."""
    from ..benchmark import rounds as benchmark

    def command() -> None:
        def make_subject(record: benchmark.Record) -> benchmark.Subject:
            if record["model"] in (*benchmark.LEANVAE, *benchmark.PEERS):
                vae = benchmark.build_model(record["model"], *_place(device, record["dtype"]))
            else:
                vae = load_model(record["model"], device, record["dtype"])
            return benchmark.Subject(vae, record["variant"])

        subjects = [(model, name) for name in variant or ["eager", "fused"]] + [(name, "eager") for name in peer or []]
        dtypes = dtype or [str(_place(device, "auto")[1]).removeprefix("torch.")]
        records: list[benchmark.Record] = [
            dict(zip(benchmark.KEYS, (*subject, number_type, num_threads, shape, direction), strict=True))
            for shape in map(benchmark.parse_size, size or ["17x256x256"])
            for number_type in dtypes
            for num_threads in threads or [torch.get_num_threads()]
            for subject in subjects
            for direction in benchmark.DIRECTIONS
        ]
        benchmark.run_here(records, make_subject, repeats, budget, lambda r: typer.echo(benchmark.describe(r)))
        result = {"rows": [benchmark.summarize(record) for record in records], "weights": model}
        if output is not None:
            write_result(output, result)
        typer.echo(json.dumps(result))

    _run(command)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("outputs/demo"),
    num_frames: Annotated[int, typer.Option(min=1, help="Frames of the clip.")] = 49,
    device: Device = "auto",
) -> None:
    """Reconstruct the bundled clip with the bundled model, offline, and say where the result lies."""
    from .demo import run_demo

    _run(lambda: run_demo(output, load_model(bundled.DEFAULT, device), num_frames))


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    warnings.showwarning = lambda message, *_: typer.echo(f"warning: {_first_sentence(message)}", err=True)  # type: ignore[arg-type, assignment]
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that unfinished outputs are removed
    if version:
        typer.echo(__version__)
        raise typer.Exit
