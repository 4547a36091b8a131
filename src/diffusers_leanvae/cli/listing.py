"""The models that are on this machine: those in the package, and those in the cache of the Hub."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import bundled, registration
from ..checks import CHECKPOINT_SUFFIXES
from ..conversion.headers import CONFIG_NAME
from ..description import describe, describe_bundled, describe_checkpoint


def list_bundled() -> Iterator[dict[str, Any]]:
    """Describe the models and pipelines in the package; see [`list_cached`]."""
    for names, place in ((bundled.MODELS, bundled.model_path), (bundled.PIPELINES, bundled.pipeline_path)):
        for name in names:
            described = describe_bundled(name)
            if described is not None:
                yield _entry(name, None, place(name), described)


def list_cached(folder: str | Path) -> Iterator[dict[str, Any]]:
    """Describe what this package can load of a cache of the Hub.

    Args:
        folder: The cache; one that does not exist is empty.

    Yields:
        `name` and `revision`, as of `load_autoencoder` or `load_pipeline`; `path`, `class`, `num_parameters` and
        `num_bytes`; and of what has latents `latent_channels`, `temporal_compression_ratio` and
        `spatial_compression_ratio`.
    """
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    if Path(folder).is_file():
        raise ValueError(f"The cache of the Hub, HF_HUB_CACHE, must be a folder, got the file {str(folder)!r}.")
    try:
        cache = scan_cache_dir(folder)
    except CacheNotFound:
        return
    for repository in sorted(cache.repos, key=lambda repository: repository.repo_id):
        if repository.repo_type != "model":
            continue
        for snapshot in sorted(repository.revisions, key=lambda snapshot: snapshot.commit_hash):
            for path, described in _models_in(snapshot.snapshot_path):
                name = Path(repository.repo_id, path.relative_to(snapshot.snapshot_path)).as_posix()
                yield _entry(name, min(snapshot.refs, default=snapshot.commit_hash), path, described)


def _models_in(root: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Find the models in a repository: the pipeline or model that it is, or those in its folders, and checkpoints."""
    whole = _describe(root)
    if whole is not None:
        yield root, whole
        return
    done = set()
    for config in sorted(root.glob(f"*/**/{CONFIG_NAME}")):
        described = _describe(config.parent)
        if described is not None:
            done.add(config.parent)
            yield config.parent, described
    for path in sorted(path for path in root.rglob("*") if path.suffix in CHECKPOINT_SUFFIXES):
        described = None if path.parent in done else _describe(path)
        if described is not None:
            yield path, described


def _describe(path: Path) -> dict[str, Any] | None:
    """Describe what this package can load; all else is passed over, and so is what is damaged or not whole."""
    try:
        described = describe_checkpoint(path) if path.is_file() else describe(str(path))
    except (ValueError, OSError):
        return None
    is_ours = described is not None and described.get("class") in {**registration.MODELS, **registration.PIPELINES}
    return described if is_ours else None


def _entry(name: str, revision: str | None, path: Path, described: dict[str, Any]) -> dict[str, Any]:
    parts = described.get("components", {"": described}).values()
    latents = next((part for part in parts if "latent_channels" in part.get("config", {})), {})
    ratios = ("temporal_compression_ratio", "spatial_compression_ratio")
    return {
        "name": name,
        "revision": revision,
        "class": described["class"],
        **({"latent_channels": latents["config"]["latent_channels"]} if latents else {}),
        **{ratio: latents[ratio] for ratio in ratios if ratio in latents},
        "num_parameters": described["num_parameters"],
        "num_bytes": sum(part.get("num_bytes", 0) for part in parts),
        "path": str(path),
    }
