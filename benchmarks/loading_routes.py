"""Measure which ways of loading a pushed model work, with the package imported or not, in each release of diffusers.

    python benchmarks/loading_routes.py                                     # the installed diffusers alone
    python benchmarks/loading_routes.py --diffusers build/diffusers-0.41.0  # others, too: folders of `pip --target`

Tiny models with the files that `push` adds are loaded from folders, every way in a process that has imported diffusers
alone. `make loading-routes` does it for all supported releases and writes results/loading_routes.json; the table is in
docs/diffusers_pipelines.md. `tests/hub/test_fresh_processes.py` does the same through a Hub.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch

from diffusers_leanvae import AutoencoderKLLeanVAE, LeanVAELattePipeline, LeanVAELatteTransformer3DModel, hub
from diffusers_leanvae.description import list_files
from diffusers_leanvae.evaluation.results import write_result
from diffusers_leanvae.generation.schedulers import make_scheduler


ROOT = Path(__file__).resolve().parent.parent
# Each attempt is made in a process of its own, which is forked from one that has imported diffusers alone.
CODE = """
import json
import os
import sys

import torch
import diffusers

torch.set_num_threads(1)
diffusers.AutoModel, diffusers.WanPipeline  # imported once, and not by every process
report = {}
CLASSES = {"vae": "AutoencoderKLLeanVAE", "shapes": "LeanVAELattePipeline"}

def attempt(source, place, loader, imports, options):
    if imports:
        import diffusers_leanvae
    else:
        assert "diffusers_leanvae" not in sys.modules
    if loader == "class":
        load = getattr(diffusers_leanvae, CLASSES[source])
    elif loader == "loading":
        from diffusers_leanvae import loading
        load = loading.load_model if source == "vae" else loading.load_diffusion_pipeline
        return type(load(place, **options)).__name__
    else:
        load = getattr(diffusers, loader)
    return type(load.from_pretrained(place, **options)).__name__

for key, (source, place, loader, imports, options) in json.loads(sys.argv[1]).items():
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            text = attempt(source, place, loader, imports, options)
        except ValueError as error:
            text = "asks for trust" if "trust_remote_code=True" in str(error) else f"ValueError: {error}"
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(write, text.encode()[:1000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        report[key] = file.read().decode()
    os.wait()
print(json.dumps(report))
"""
WITHOUT_TEXT: dict[str, Any] = {"tokenizer": None, "text_encoder": None}
TRUST = {"trust_remote_code": True}
# Kind -> how diffusers loads it without being told its class, further arguments, its class.
KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "vae": ("AutoModel", {}, "AutoencoderKLLeanVAE"),
    "shapes": ("DiffusionPipeline", {}, "LeanVAELattePipeline"),
    "wan": ("DiffusionPipeline", WITHOUT_TEXT, "WanPipeline"),
}
NAMES = {"vae": "an autoencoder", "shapes": "a Latte pipeline", "wan": "a `WanPipeline` with an autoencoder"}


def list_routes(sources: dict[str, str]) -> dict[str, tuple[str, str, str, bool, dict[str, Any]]]:
    """List every way: kind, place, what loads it, whether the package is imported before, further arguments."""
    routes: dict[str, tuple[str, str, str, bool, dict[str, Any]]] = {}
    for kind, (loader, options, _) in KINDS.items():
        place = sources[kind]
        routes[f"{kind}, trusted"] = (kind, place, loader, False, options | TRUST)
        routes[f"{kind}, imported"] = (kind, place, loader, True, options)
        routes[f"{kind}, imported and trusted"] = (kind, place, loader, True, options | TRUST)
        routes[f"{kind}, loading"] = (kind, place, "loading", True, options)
        if kind != "wan":
            routes[f"{kind}, class"] = (kind, place, "class", True, options)
    return routes


# diffusers asks for trust wherever a repository brings code, but not for a stock pipeline whose parts it knows.
EXPECTED = {name: KINDS[route[0]][2] for name, route in list_routes(dict.fromkeys(KINDS, "")).items()}
EXPECTED |= dict.fromkeys(("vae, imported", "shapes, imported"), "asks for trust")


def measure(sources: dict[str, str], environment: dict[str, str]) -> dict[str, str]:
    """Try every way of loading in a new interpreter with these variables: the class that came, or what went wrong."""
    result = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(list_routes(sources))],
        env=os.environ | {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONWARNINGS": "ignore"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise RuntimeError(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def save_models(folder: Path) -> dict[str, str]:
    """Save one of each kind as it would be pushed."""
    torch.manual_seed(0)
    vae = AutoencoderKLLeanVAE(low_freq_dim=8, high_freq_dim=24, num_fusion_layers=1)
    size = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2}
    transformer = LeanVAELatteTransformer3DModel(**size, sample_size=4, num_latent_frames=3)
    wan = diffusers.WanTransformer3DModel(**size, in_channels=4, out_channels=4, text_dim=16, freq_dim=32, ffn_dim=32)
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    models = {
        "vae": vae,
        "shapes": LeanVAELattePipeline(vae, transformer, make_scheduler("ddim")),
        "wan": diffusers.WanPipeline(None, None, vae, flow, wan),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        for file, content in hub.make_shims(list_files(folder / name)).items():
            (folder / name / file).write_bytes(content)
    return {name: str(folder / name) for name in models}


def describe(route: tuple[str, str, str, bool, dict[str, Any]]) -> dict[str, str]:
    """Put a way of loading into words."""
    kind, _, loader, imported, options = route
    name = {"class": KINDS[kind][2], "loading": "diffusers_leanvae.loading"}.get(loader, loader)
    trust = " with `trust_remote_code=True`" if TRUST.items() <= options.items() else ""
    call = f"`{name}.from_pretrained`" if loader != "loading" else f"`{name}`"
    return {"model": NAMES[kind], "call": call + trust, "package": "imported" if imported else "not imported"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusers", type=Path, action="append", default=[], help="folder of another diffusers")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "loading_routes.json")
    options = parser.parse_args()
    with TemporaryDirectory() as name:
        sources = save_models(Path(name))
        rows = {key: describe(route) for key, route in list_routes(sources).items()}
        for place in (*options.diffusers, None):
            paths = [] if place is None else [str(place.resolve())]
            paths += filter(None, [os.environ.get("PYTHONPATH")])
            environment = {"PYTHONPATH": os.pathsep.join(paths), "HF_HOME": f"{name}/hf", "HF_HUB_OFFLINE": "1"}
            code = "import diffusers; print(diffusers.__version__)"
            found = subprocess.run(
                [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
            )
            for key, value in measure(sources, environment).items():
                rows[key][f"diffusers {found.stdout.strip()}"] = value
    for row in rows.values():
        print(*row.values(), sep=" | ")
    write_result(options.output, {"rows": list(rows.values())})


if __name__ == "__main__":
    main()
