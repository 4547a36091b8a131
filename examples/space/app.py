"""A Space of three tabs: reconstruct a clip, compare models, generate. README.md says how it gets to the Hub."""

import tempfile
from pathlib import Path
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
FOLDER = Path(tempfile.mkdtemp(prefix="leanvae-space-"))


def table(rows: list[dict[str, Any]]) -> str:
    """Lay out figures with a column for each model, which is narrow enough for a phone."""
    lines = [[name, *(str(row[name]) for row in rows)] for name in rows[0]]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show(name: str, clip: str | None, models: list[str], num_frames: float) -> tuple[str, str]:
    if clip is None:
        raise gr.Error("Choose a clip first.", print_exception=False)
    path = FOLDER / name
    try:
        rows = tabs.compare(clip, models, int(num_frames), path)
    except ValueError as error:  # a file that is no video, or damaged
        sentence = str(error).replace(clip, Path(clip).name)
        raise gr.Error(sentence, print_exception=False) from None
    return str(path), table(rows)


def reconstruct(clip: str | None, model: str, num_frames: float) -> tuple[str, str]:
    return show("reconstruction.mp4", clip, [model], num_frames)


def compare(clip: str | None, first: str, second: str, num_frames: float) -> tuple[str, str]:
    return show("comparison.mp4", clip, [first, second], num_frames)


def generate(label: str, num_steps: float, seed: float) -> str:
    path = FOLDER / "generated.mp4"
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
                seed = gr.Number(0, precision=0, minimum=0, label="Seed")
                button = gr.Button("Generate", variant="primary")
            with gr.Column():
                output = result("Four videos of this class")
        button.click(generate, [label, num_steps, seed], output)

if __name__ == "__main__":
    demo.launch(max_file_size="100mb")
