"""What `eval` does for several subjects, and for folders of generated videos."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..checks import check_place
from .common import place, print_json, render_table


if TYPE_CHECKING:
    from ..evaluation.measures import MetricOptions
    from ..evaluation.protocols import Protocol
    from ..evaluation.records import Evaluation


def compare_subjects(
    models: Sequence[str] | Mapping[str, str],
    codecs: Sequence[str],
    source: str,
    protocol: "Protocol",
    options: "MetricOptions",
    report: Path,
    num_examples: int,
    device: str,
    dtype: str,
    as_json: bool,
    argument: str = "models",
) -> None:
    """Compare autoencoders and codecs, print the table and write the report.

    Args:
        models: As of [`evaluation.comparison.compare`], as are the following.
        codecs: Names.
        source: The clips.
        protocol: What is measured.
        options: Where weights of metrics come from.
        report: Folder of `--report`.
        num_examples: Clips that the report shows.
        device: As of `--device`.
        dtype: As of `--dtype`.
        as_json: Whether to print JSON.
        argument: The option that names the models, for messages.
    """
    from ..evaluation.comparison import compare
    from ..evaluation.journal import Journal
    from ..evaluation.report import write_report
    from ..launching import is_first_process, leaving_job

    check_place("`--report`", report, report)
    torch_device, torch_dtype = place(device, dtype)
    kept = report / ".progress"
    is_first = is_first_process()
    with leaving_job():
        comparison = compare(
            models,
            source,
            protocol,
            kept,
            codecs=codecs,
            options=options,
            num_examples=num_examples,
            device=torch_device,
            dtype=torch_dtype,
            progress=partial(typer.echo, err=as_json),
            argument=argument,
        )
    if not is_first:
        return
    typer.echo("\n" + render_totals(comparison.evaluations), err=as_json)
    say_missing(comparison.evaluations[0])
    say_failed(comparison.evaluations[0])
    written = write_report(report, comparison)
    for path in written:
        typer.echo(str(path), err=as_json)
    if as_json:
        evaluations = [evaluation.rounded().to_json() for evaluation in comparison.evaluations]
        print_json({"evaluations": evaluations, "report": written})
    Journal.remove(kept)
    check_scored(comparison.evaluations)


def compare_folders(
    generated: str,
    real: str,
    protocol: "Protocol",
    options: "MetricOptions",
    output: Path | None,
    device: str,
    as_json: bool,
) -> None:
    """Measure FVD of two folders, print it and write the file if one is wanted."""
    from ..evaluation.generated import evaluate_generated

    torch_device, _ = place(device, "float32")
    say = partial(typer.echo, err=as_json)
    evaluation = evaluate_generated(generated, real, protocol, options, device=torch_device, progress=say)
    say_missing(evaluation)
    for name, value in evaluation.totals.items():
        say(f"{name} {value:.{evaluation.metrics[name].digits}f}")
    say(f"{evaluation.about['num_generated']} generated and {evaluation.about['num_real']} real videos")
    if output is not None:
        evaluation.write(output)
        say(str(output))
    if as_json:
        print_json(evaluation.rounded().to_json())


def say_missing(evaluation: "Evaluation") -> None:
    """Say on stderr which metrics are absent, and why."""
    for name, reason in evaluation.missing.items():
        typer.echo(f"left out: {name}: {reason}", err=True)


def say_failed(evaluation: "Evaluation") -> None:
    """Say on stderr which files were left out, if any."""
    failed = evaluation.failed
    if failed:
        total = len(failed) + evaluation.num_videos
        typer.echo(f"{len(failed)} of {total} files failed: {', '.join(failed)}", err=True)


def check_scored(evaluations: "Sequence[Evaluation]") -> None:
    """Refuse evaluations of the same metrics that have a figure of none: the rate alone was not asked for."""
    from ..evaluation.reconstructors import BITS_PER_PIXEL

    asked_for = evaluations[0].protocol["metrics"]
    if asked_for and all(evaluation.totals.keys() <= {BITS_PER_PIXEL} for evaluation in evaluations):
        raise ValueError(f"`metrics` must have one that suits the clips, got {', '.join(asked_for)}.")


def render_totals(evaluations: "Sequence[Evaluation]") -> str:
    """Lay out the totals of all subjects as a table of text."""
    names = dict.fromkeys(name for evaluation in evaluations for name in evaluation.totals)
    metrics = {name: metric for evaluation in evaluations for name, metric in evaluation.metrics.items()}
    head = ["", *(metrics[name].label for name in names)]
    lines = [
        [
            evaluation.model,
            *(
                f"{evaluation.totals[name]:.{metrics[name].digits}f}" if name in evaluation.totals else ""
                for name in names
            ),
        ]
        for evaluation in evaluations
    ]
    return render_table([head, *lines])
