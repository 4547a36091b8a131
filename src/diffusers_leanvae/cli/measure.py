"""Speed: `bench`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import bundled
from ..benchmark.names import LEANVAE, PEERS, VARIANTS
from ..checks import check_choice, one_line, parse_video_size, reason_of
from .choices import DTYPE_NAMES, complete
from .common import Device, Json, Output, check_file, load_model, place, print_json, render_table


if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ..benchmark.rounds import Record
    from ..benchmark.subjects import Subject

RANDOM_MODELS = tuple(name for name in LEANVAE if name != "LeanVAE-tiny")  # that one is for tests


def bench(
    model: Annotated[
        str,
        typer.Option(
            help=f"Autoencoder, as of other commands; or {' or '.join(RANDOM_MODELS)}, in full size with random "
            "weights.",
            autocompletion=complete(*bundled.MODELS, *RANDOM_MODELS),
        ),
    ] = bundled.DEFAULT,
    size: Annotated[
        list[str] | None,
        typer.Option(help="Size of the video, FRAMESxHEIGHTxWIDTH; repeat it for several. Without it 17x256x256."),
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            help="Way to compute: eager, compiled; for LeanVAE also fused, fused-torch, graphs. Repeat it for "
            "several. Without it eager and fused.",
            autocompletion=complete(*VARIANTS),
        ),
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Autoencoder to measure as well: {', '.join(PEERS)}, in full size with random weights; or a folder, "
            "`Class` or `Class:place` of diffusers. Repeat it for several.",
            autocompletion=complete(*PEERS),
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            help="Number type, as of other commands; repeat it for several. Without it auto.",
            autocompletion=complete("auto", *DTYPE_NAMES),
        ),
    ] = None,
    threads: Annotated[
        list[int] | None,
        typer.Option(min=1, max=1024, help="Number of CPU threads; repeat it for several. Without it all."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=0, help="Number of timed calls after the first.")] = 7,
    budget: Annotated[
        float, typer.Option(min=0, help="Time for each row in seconds; slow models get fewer repeats.")
    ] = 60.0,
    output: Output = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure time, peak memory and multiply-adds of encoding and decoding.

    For LeanVAE also the time over that of its matrix products alone.
    """
    import torch

    from ..benchmark import rounds, subjects
    from ..benchmark.work import DIRECTIONS, count_work
    from ..evaluation.results import write_result

    def say(record: "Record") -> None:
        typer.echo(rounds.describe(record), err=True)

    def make_subject(record: "Record") -> "Subject":
        is_peer = record["model"] in (peer or ())
        return subjects.Subject(_make_model(record["model"], device, record["dtype"], is_peer), record["variant"])

    # Whatever can be refused is refused here, before anything is measured.
    check_file("--output", output)
    sizes = _once(parse_video_size("--size", text) for text in size or ["17x256x256"])
    dtypes = _once(str(place(device, name)[1]).removeprefix("torch.") for name in dtype or ["auto"])
    kind = place(device, "float32")[0].type
    possible = [name for name in VARIANTS if name != "graphs" or kind == "cuda"]
    for name in variant or ():
        check_choice("--variant", name, possible, f"on {kind}")
    for name in set(peer or ()) - PEERS.keys():
        _make_model(name, device, dtypes[0], is_peer=True)
    vae = _make_model(model, device, dtypes[0], is_peer=False)
    legal = subjects.variants_of(vae)
    wanted = _once(variant or ["eager", "fused"])
    variants = [name for name in wanted if name in legal]
    left_out = [name for name in wanted if name not in legal]
    if not variants:
        check_choice("--variant", left_out[0], legal, f"for an {type(vae).__name__}")
    if model not in PEERS:
        for shape in sizes:
            try:
                count_work(vae, shape)
            except ValueError as error:
                given, reason = "x".join(map(str, shape)), reason_of(error).replace("`", "")
                raise ValueError(f"`--size` must be one that the model takes, got {given!r}: {reason}.") from None
    if left_out:
        typer.echo(f"left out, because only LeanVAE has it: {', '.join(left_out)}", err=True)
    del vae

    tasks = [(model, name) for name in variants] + [(name, "eager") for name in _once(peer or [])]
    records: list[Record] = [
        dict(zip(rounds.KEYS, (*task, number_type, num_threads, list(shape), direction), strict=True))
        for shape in sizes
        for number_type in dtypes
        for num_threads in _once(threads or [torch.get_num_threads()])
        for task in tasks
        for direction in DIRECTIONS
    ]
    try:
        rounds.run_here(records, make_subject, repeats, budget, say)
    finally:  # whatever ends it, what is measured is reported
        rows = [rounds.summarize(record) for record in records if "first" in record or "note" in record]
        result = {"rows": rows, "weights": model}
        if rows and as_json:
            print_json(result)
        elif rows:
            typer.echo(render_rows(rows))
        if rows and output is not None:
            write_result(output, result)
    notes = [row["note"] for row in rows if "note" in row]
    if notes:
        raise ValueError(f"{len(notes)} of {len(rows)} rows could not be measured: {one_line(notes[0])}")


def _once(values: "Iterable[Any]") -> list[Any]:
    """Leave out what comes again: it would be measured twice."""
    return list(dict.fromkeys(values))


def render_rows(rows: "Sequence[Record]") -> str:
    """Lay out what was measured as a table of text."""
    head = ["", "", "threads", "frames x height x width", "", "seconds", "peak MiB", "GMAC", "over floor"]
    lines = [
        [
            f"{row['model']} {row['variant']}",
            row["dtype"],
            str(row["num_threads"]),
            "x".join(map(str, row["video"])),
            row["direction"],
            *(_cell(row, name) for name in ("seconds", "peak_mib", "giga_multiply_adds", "time_over_floor")),
        ]
        for row in rows
    ]
    return render_table([head, *lines])


def _cell(row: "Record", name: str) -> str:
    return f"{row[name]:.4g}" if row.get(name) is not None else ""


def _make_model(name: str, device: str, number_type: str, is_peer: bool) -> Any:
    from ..benchmark.subjects import build_model
    from ..evaluation.autoencoders import is_image_autoencoder, open_autoencoder

    if name in (*LEANVAE, *PEERS):
        return build_model(name, *place(device, number_type))
    if not is_peer:
        return load_model(name, device, number_type)
    try:
        vae = open_autoencoder(name, *place(device, number_type)).vae
        if is_image_autoencoder(vae):
            raise ValueError("it takes images")
    except ValueError as error:
        legal = "a name that `leanvae bench --help` lists, or a video autoencoder"
        raise ValueError(f"`--peer` must be {legal}, got {name!r}: {error}") from None
    return vae
