"""Make `tests/fixtures/{wf,iv}vae_tiny.safetensors` and `wfvae_losses.safetensors`: the references' numbers.

    python scripts/make_sibling_fixtures.py ../shared/golden

The sources hold outputs of the public WF-VAE (arXiv 2411.17459) and IV-VAE (arXiv 2411.06449) implementations for
weights that follow from a seed (`tests/models/recipe_weights.py`), so that these need not be kept; and the losses of
WF-VAE, of everything that its training script puts into them.
"""

import argparse
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file


OUTPUT = Path(__file__).resolve().parents[1] / "tests" / "fixtures"
FIXTURES = {
    "wfvae_tiny": ("wfvae_tiny_8ch", ("video", "enc.moments", "latent", "dec.sample")),
    "ivvae_tiny": ("ivvae_tiny_z4", ("video", "enc.mean", "latent", "dec.sample")),
    "wfvae_losses": ("wfvae_losses", None),  # all but what follows from other tensors
}
LEFT_OUT = ("recon",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of the golden files")
    arguments = parser.parse_args()
    for name, (source, keys) in FIXTURES.items():
        with safe_open(arguments.source / f"{source}.safetensors", "pt") as file:
            keys = [key for key in file.keys() if key not in LEFT_OUT] if keys is None else keys
            tensors = {key: file.get_tensor(key).contiguous() for key in keys}
            metadata = {key: file.metadata()[key] for key in ("config", "seed")} | {"format": "pt", "source": source}
        path = OUTPUT / f"{name}.safetensors"
        save_file(tensors, path, metadata=metadata)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
