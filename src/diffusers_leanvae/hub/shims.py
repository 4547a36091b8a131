"""Files that let diffusers load a pushed model where this package is installed but not imported."""

import json
from pathlib import Path
from typing import Any

from ..conversion.headers import CONFIG_NAME
from ..description import INDEX_NAME, class_of_index, read_json
from ..registration import MODELS, PIPELINES, SHIM


# The same in every repository: diffusers copies the files of all folders on disk to one place, under this name.
SHIM_TEXT = f'''\
"""The classes of diffusers-leanvae, which must be installed, for `trust_remote_code=True` of diffusers."""

from diffusers_leanvae import {", ".join(sorted([*MODELS, *PIPELINES]))}  # noqa: F401
'''


def make_shims(files: dict[str, Path]) -> dict[str, bytes]:
    """Make the files that differ or are new, so that `trust_remote_code=True` replaces the import of the package.

    Next to every config of ours comes a small module that imports the package, and the config names it as `auto_map`.
    The index of a pipeline names that module as the library of our classes.

    Args:
        files: The files of a saved model or pipeline, by their names in its folder.

    Returns:
        The contents by name.
    """
    made: dict[str, bytes] = {}
    if INDEX_NAME not in files:
        return _make_shim(files, "")
    index = read_json(files[INDEX_NAME])
    for name, value in index.items():
        if isinstance(value, list) and len(value) == 2 and value[1] in MODELS:
            shim = _make_shim(files, f"{name}/")
            made |= shim
            index[name] = [SHIM, value[1]] if shim else value
    if class_of_index(index) in PIPELINES:
        index["_class_name"] = [SHIM, class_of_index(index)]
        made[f"{SHIM}.py"] = SHIM_TEXT.encode()
    return made | ({INDEX_NAME: _to_json(index)} if made else {})


def _make_shim(files: dict[str, Path], folder: str) -> dict[str, bytes]:
    path = files.get(f"{folder}{CONFIG_NAME}")
    config = {} if path is None else read_json(path)
    if config.get("_class_name") not in MODELS:
        return {}
    config["auto_map"] = {"AutoModel": f"{SHIM}.{config['_class_name']}"}
    return {f"{folder}{CONFIG_NAME}": _to_json(config), f"{folder}{SHIM}.py": SHIM_TEXT.encode()}


def _to_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
