"""A Space of three tabs: reconstruct a clip, compare models, generate. README.md says how it gets to the Hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
import tabs

from diffusers_leanvae import bundled


MODELS = list(bundled.MODELS)
NOTE = """\
# LeanVAE

Video autoencoders for diffusers. The models here are small demonstrations, trained in hours on 51 short clips: they
show how it works, and say nothing about the quality of the released weights. Of a clip the first frames are taken, at
256 pixels on the shorter side.
"""
# Fixed names: Gradio copies what a tab returns before the next visitor's turn, and clears its copies after an hour.
STORAGE = TemporaryDirectory(prefix="leanvae-space-")  # which goes at the end
FOLDER = Path(STORAGE.name)
LARGEST_SEED = 2**53 - 1  # integers beyond it are rounded by browsers


def table(rows: list[dict[str, Any]]) -> str:
    """Lay out figures with a column for each model, which is narrow enough for a phone."""
    lines = [[name, *(str(row[name]) for row in rows)] for name in rows[0]]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@contextmanager
def explained(fields: dict[str, Any], file: Any) -> Iterator[None]:
    """Tell the visitor in a sentence which field is empty, or what is wrong with a number or the file."""
    for name, value in fields.items():
        if value is None:
            raise gr.Error(f"Choose a {name} first.", print_exception=False)
    try:
        yield
    except ValueError as error:
        raise gr.Error(str(error).replace(str(file), Path(file).name), print_exception=False) from None


# Arguments are what the fields hold; an emptied one holds `None`.
def show(name: str, clip: Any, models: list[Any], num_frames: Any) -> tuple[str, str]:
    path = FOLDER / name
    fields = {"clip": clip, "model": None if None in models else models, "number of frames": num_frames}
    with explained(fields, clip):
        rows = tabs.compare(clip, models, int(num_frames), path)
    return str(path), table(rows)


def reconstruct(clip: Any, model: Any, num_frames: Any) -> tuple[str, str]:
    return show("reconstruction.mp4", clip, [model], num_frames)


def compare(clip: Any, first: Any, second: Any, num_frames: Any) -> tuple[str, str]:
    return show("comparison.mp4", clip, [first, second], num_frames)


def generate(label: Any, num_steps: Any, seed: Any) -> str:
    path = FOLDER / "generated.mp4"
    with explained({"class": label, "number of steps": num_steps, "seed": seed}, path):
        tabs.generate(label, int(num_steps), int(seed), path)
    return str(path)


def inputs() -> tuple[gr.Video, gr.Slider]:
    clip = gr.Video(str(bundled.clip_path()), label="Clip")
    return clip, gr.Slider(1, 49, value=17, step=4, label="Frames")


def result(caption: str) -> gr.Video:
    gr.Markdown(caption)  # a label would hide a part of the video
    return gr.Video(show_label=False, autoplay=True, loop=True, interactive=False)


with gr.Blocks(title="LeanVAE", delete_cache=(3600, 3600)) as demo:
    gr.Markdown(NOTE)
    with gr.Tab("Reconstruct"):
        with gr.Row():
            with gr.Column():
                clip, num_frames = inputs()
                model = gr.Dropdown(MODELS, value=MODELS[0], label="Model")
                button = gr.Button("Reconstruct", variant="primary")
            with gr.Column():
                outputs = [result("Original (left) and reconstruction (right)"), gr.Markdown()]
        button.click(reconstruct, [clip, model, num_frames], outputs)
    with gr.Tab("Compare"):
        with gr.Row():
            with gr.Column():
                clip, num_frames = inputs()
                first = gr.Dropdown(MODELS, value=MODELS[0], label="First model")
                second = gr.Dropdown(MODELS, value=MODELS[1], label="Second model")
                button = gr.Button("Compare", variant="primary")
            with gr.Column():
                outputs = [result("Original, first model, second model"), gr.Markdown()]
        button.click(compare, [clip, first, second, num_frames], outputs)
    with gr.Tab("Generate"):
        with gr.Row():
            with gr.Column():
                label = gr.Dropdown(tabs.labels(), value="red circle left", label="Class")
                num_steps = gr.Slider(5, 50, value=25, step=1, label="Steps")
                seed = gr.Number(0, precision=0, minimum=0, maximum=LARGEST_SEED, label="Seed")
                button = gr.Button("Generate", variant="primary")
            with gr.Column():
                output = result("Four videos of this class")
        button.click(generate, [label, num_steps, seed], output)

if __name__ == "__main__":
    demo.launch(max_file_size="100mb")
