"""Speed: `bench`."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import bundled
from ..checks import check_choice, one_line, parse_video_size
from .common import Device, Output, load_model, place


if TYPE_CHECKING:
    from ..benchmark.rounds import Record
    from ..benchmark.subjects import Subject


def bench(
    model: Annotated[
        str,
        typer.Option(
            help="Autoencoder, as of other commands; or LeanVAE-16ch or LeanVAE-4ch, in full size with random weights."
        ),
    ] = bundled.DEFAULT,
    size: Annotated[
        list[str] | None,
        typer.Option(help="Size of the video, FRAMESxHEIGHTxWIDTH; repeat it for several. Without it 17x256x256."),
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            help="Way to compute: eager, compiled; for LeanVAE also fused, fused-torch, int8, graphs. Repeat it for "
            "several. Without it eager and fused."
        ),
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            help="Autoencoder of diffusers to measure as well, such as AutoencoderKLWan; repeat it for several."
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="Number type, as of other commands; repeat it for several. Without it auto."),
    ] = None,
    threads: Annotated[
        list[int] | None, typer.Option(min=1, help="Number of CPU threads; repeat it for several. Without it all.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=0, help="Number of timed calls after the first.")] = 7,
    budget: Annotated[
        float, typer.Option(min=0, help="Time for each row in seconds; slow models get fewer repeats.")
    ] = 60.0,
    output: Output = None,
    device: Device = "auto",
) -> None:
    """Measure time, peak memory and multiply-adds of encoding and decoding; the last line is JSON.

    For LeanVAE also the time over that of its matrix products alone.
    """
    import torch

    from ..benchmark import rounds, subjects
    from ..benchmark.work import DIRECTIONS, count_work
    from ..evaluation.results import write_result

    random_models = (*subjects.LEANVAE, *subjects.PEERS)

    def make_model(name: str, number_type: str) -> Any:
        if name in random_models:
            return subjects.build_model(name, *place(device, number_type))
        return load_model(name, device, number_type)

    def make_subject(record: "Record") -> "Subject":
        return subjects.Subject(make_model(record["model"], record["dtype"]), record["variant"])

    # Whatever can be refused is refused here, before anything is measured.
    sizes = [parse_video_size("--size", text) for text in size or ["17x256x256"]]
    dtypes = [str(place(device, name)[1]).removeprefix("torch.") for name in dtype or ["auto"]]
    for name in variant or ():
        check_choice("--variant", name, subjects.VARIANTS)
    for name in peer or ():
        check_choice("--peer", name, subjects.PEERS)
    vae = make_model(model, dtypes[0])
    legal = subjects.variants_of(vae)
    variants = [name for name in variant or ["eager", "fused"] if name in legal]
    left_out = [name for name in variant or ["eager", "fused"] if name not in legal]
    if not variants:
        check_choice("--variant", left_out[0], legal, f"for an {type(vae).__name__}")
    if model not in subjects.PEERS:
        for shape in sizes:
            count_work(vae, shape)
    if left_out:
        typer.echo(f"left out, because only LeanVAE has it: {', '.join(left_out)}", err=True)
    del vae

    tasks = [(model, name) for name in variants] + [(name, "eager") for name in peer or []]
    records: list[Record] = [
        dict(zip(rounds.KEYS, (*task, number_type, num_threads, list(shape), direction), strict=True))
        for shape in sizes
        for number_type in dtypes
        for num_threads in threads or [torch.get_num_threads()]
        for task in tasks
        for direction in DIRECTIONS
    ]
    try:
        rounds.run_here(records, make_subject, repeats, budget, lambda record: typer.echo(rounds.describe(record)))
    finally:  # whatever ends it, what is measured is reported
        rows = [rounds.summarize(record) for record in records if "first" in record or "note" in record]
        result = {"rows": rows, "weights": model}
        if rows:
            typer.echo(json.dumps(result))
        if rows and output is not None:
            write_result(output, result)
    notes = [row["note"] for row in rows if "note" in row]
    if notes:
        raise ValueError(f"{len(notes)} of {len(rows)} rows could not be measured: {one_line(notes[0])}")
