"""Copy models from the Hub into folders, checked file by file."""

import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.hf_api import RepoSibling

from ..atomic import replace_folder
from ..checks import sha256
from ..description import check_model_folder, list_shards, parse_weights_name
from ..hub_errors import hub_reason
from .pushing import check_repo_id


def pull(
    repo_id: str,
    folder: Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    token: str | None = None,
) -> None:
    """Copy a repository of a model into a folder, which appears when all of it is there and sound.

    Files come through the cache of huggingface_hub: after an interruption those that were complete are not fetched
    again. Each is compared with the checksum that the Hub has of it. Nothing is unpickled or run.

    Args:
        repo_id: `user/name`.
        folder: Folder to make; an empty one, or one with a saved model, pipeline or adapter, is replaced.
        revision: Branch, tag or commit; the main branch by default.
        variant: Weights of this variant instead of the plain ones, where there are any.
        token: Token of the Hub, the stored one by default.

    Raises:
        ValueError: If it cannot be had, a file is damaged or missing or its name leads out of the folder, or if the
            folder is the current one or has anything else; in one sentence.
    """
    check_repo_id("repo_id", repo_id)
    check_model_folder("`folder`", Path(folder))
    name = None
    try:
        info = HfApi(token=token).model_info(repo_id, revision=revision, files_metadata=True)
        files = {file.rfilename: file for file in info.siblings or ()}
        _check_inside(repo_id, files)
        with replace_folder(folder) as partial:
            names = _select_variant(repo_id, files, variant)
            for name in sorted(names, key=lambda name: not _is_index(name)):  # what these lack is known soonest
                source = Path(hf_hub_download(repo_id, name, revision=info.sha, token=token))
                _check_sound(source, repo_id, files[name])
                if _is_index(name):
                    _check_shards(source, repo_id, name, names)
                target = partial / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
            for name in names[:1]:  # by the name of the revision, whose commit the cache then knows without connection
                hf_hub_download(repo_id, name, revision=revision, token=token)
    except Exception as error:  # huggingface_hub lets errors of its HTTP client through
        reason = hub_reason(error, f"model {repo_id!r}", revision, name)
        if reason is None:
            raise
        raise ValueError(f"`repo_id` must be a model that can be pulled, got {repo_id!r}: {reason}.") from error


def _check_inside(repo_id: str, names: Iterable[str]) -> None:
    """Refuse names that lead out of a folder, on any system."""
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
            raise ValueError(f"`repo_id` must have files inside its folder, got {repo_id!r} with {name!r}.")


def _select_variant(repo_id: str, names: Iterable[str], variant: str | None) -> list[str]:
    """Leave out the weights of other variants, and the plain ones where there are those of this variant."""
    found: dict[str, tuple[str, str | None]] = {}
    variants: dict[str, set[str | None]] = {}
    for name in names:
        parsed = parse_weights_name(name)
        plain, of_name = (name, None) if parsed is None else (parsed.plain, parsed.variant)
        found[name] = plain, of_name
        variants.setdefault(plain, set()).add(of_name)
    if variant is not None and not any(variant in legal for legal in variants.values()):
        names = ", ".join(sorted({repr(name) for _, name in found.values() if name is not None})) or "none"
        raise ValueError(f"`variant` must be one of {repo_id!r}, which has {names}, got {variant!r}.")
    wanted = {plain: variant if variant in legal else None for plain, legal in variants.items()}
    return [
        name
        for name, (plain, of_name) in found.items()
        if of_name == wanted[plain] or wanted[plain] not in variants[plain]
    ]


def _is_index(name: str) -> bool:
    parsed = parse_weights_name(name)
    return parsed is not None and parsed.is_index


def _check_shards(index: Path, repo_id: str, name: str, names: Iterable[str]) -> None:
    """Refuse a repository without a file that an index of weights in it, called `name`, tells to be next to it."""
    try:
        shards = [str(PurePosixPath(name).with_name(shard)) for shard in list_shards(index)]
    except ValueError:
        raise ValueError(f"`repo_id` must have sound files, got {repo_id!r} with a damaged {name!r}.") from None
    if missing := sorted(set(shards) - set(names)):
        raise ValueError(
            f"`repo_id` must have all files that its {name!r} names, got {repo_id!r} without {len(missing)} of them, "
            f"for instance {missing[0]!r}."
        )


def _check_sound(path: Path, repo_id: str, file: RepoSibling) -> None:
    """Compare a file with its checksum on the Hub; a damaged one leaves the cache, so that it is fetched again."""
    if file.lfs is not None:
        is_same = sha256(path) == file.lfs.sha256
    elif file.blob_id is not None:
        start = f"blob {path.stat().st_size}\0".encode()  # as git makes its checksums
        with path.open("rb") as content:
            is_same = hashlib.file_digest(content, lambda: hashlib.sha1(start)).hexdigest() == file.blob_id
    else:
        is_same = file.size in (None, path.stat().st_size)
    if not is_same:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise ValueError(
            f"`repo_id` must have sound files, got {repo_id!r} with a damaged {file.rfilename!r}: pull it again."
        )
