"""Build the wheel, install it into fresh environments of several Pythons, and run its commands away from the checkout.

    python scripts/check_wheel.py                      # the Pythons that are found (`make wheel-check`)
    python scripts/check_wheel.py --python /usr/bin/python3.11 --python ~/.pyenv/versions/3.13.0/bin/python

Writes results/wheel_check.json; the table is in docs/install.md. All extras are resolved together, without installing
them. Where pip has no PyTorch for a Python, all the rest is installed, and the commands that need none are run.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from diffusers_leanvae.evaluation.results import write_result


ROOT = Path(__file__).resolve().parents[1]
MINORS = (11, 12, 13, 14)
WITH_TORCH = {"torch", "torchmetrics"}  # what is, or needs, PyTorch
LIGHT = (("--help",), ("models",), ("info", "compact-4ch"))
FULL = (*LIGHT, ("demo",))


def find_pythons() -> list[str]:
    """Find one Python of each minor version, on the path or among those of pyenv."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    found = []
    for minor in MINORS:
        candidates = [shutil.which(f"python3.{minor}"), *sorted(root.glob(f"3.{minor}.*/bin/python3"), reverse=True)]
        found += [str(python) for python in candidates if python and version_of(str(python))][:1]
    return found


def version_of(python: str) -> str | None:
    """Return the version of a Python, `None` if it does not run: pyenv's commands exist for versions that are off."""
    code = "import platform; print(platform.python_version())"
    result = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else None


def requirements_without_torch(metadata: Message) -> list[str]:
    """List what a wheel needs, without extras and without what is, or needs, PyTorch."""
    needed = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    return [
        str(requirement)
        for requirement in needed
        if requirement.name not in WITH_TORCH
        and (requirement.marker is None or requirement.marker.evaluate({"extra": ""}))
    ]


def read_metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as file:
        (name,) = [name for name in file.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(file.read(name).decode())


def check(python: str, wheel: Path, folder: Path) -> dict[str, Any]:
    """Install a wheel into a fresh environment in `folder` and run its commands.

    Raises:
        subprocess.CalledProcessError: If one fails.
    """
    subprocess.run([python, "-m", "venv", "--clear", folder / "venv"], check=True)
    executables, place = folder / "venv" / "bin", folder / "elsewhere"
    place.mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    install = [str(executables / "python"), "-m", "pip", "install", "-qq", "--no-input"]
    pinned, metadata = [*install, "-c", str(ROOT / "constraints.txt")], read_metadata(wheel)
    begin = time.monotonic()
    result = subprocess.run([*pinned, wheel], env=environment, check=False)
    has_torch = result.returncode == 0
    if not has_torch:
        print(f"{python}: pip finds no PyTorch for it; the rest is installed without", flush=True)
        subprocess.run([*install, "--no-deps", wheel], env=environment, check=True)
        subprocess.run([*install, *requirements_without_torch(metadata)], env=environment, check=True)
    row = {"Python": version_of(str(executables / "python")), "installed": "whole" if has_torch else "without PyTorch"}
    row["to install (s)"] = round(time.monotonic() - begin)
    extras = metadata.get_all("Provides-Extra", [])
    if has_torch:  # by the name of what is installed, as the errors say of what an absent extra brings
        print(f"{row['Python']}: {', '.join(extras)}", flush=True)
        wanted = f"{metadata['Name']}[{','.join(extras)}]"
        subprocess.run([*pinned, "--dry-run", wanted], env=environment, check=True, stdout=subprocess.DEVNULL)
    row["extras resolved"] = f"all {len(extras)}" if has_torch else "none"
    ran = FULL if has_torch else LIGHT
    begin = time.monotonic()
    for arguments in ran:
        print(f"{row['Python']}: leanvae {' '.join(arguments)}", flush=True)
        subprocess.run(
            [executables / "leanvae", *arguments], cwd=place, env=environment, check=True, stdout=subprocess.DEVNULL
        )
    row["ran"] = ", ".join(f"`leanvae {' '.join(arguments)}`" for arguments in ran)
    row["to run (s)"] = round(time.monotonic() - begin)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", help="a Python to check; repeat it for several")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "wheel-check", help="folder for environments")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "wheel_check.json")
    options = parser.parse_args()
    pythons = options.python or find_pythons()
    for python in pythons:
        if shutil.which(python) is None or version_of(python) is None:
            parser.error(f"`--python` must be a Python that runs, got {python!r}.")
    shutil.rmtree(options.work, ignore_errors=True)
    # What an earlier build left would hide a file that is missing.
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)
    build = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--wheel-dir", options.work, ROOT]
    subprocess.run(build, check=True)
    (wheel,) = options.work.glob("*.whl")
    rows = [check(python, wheel, options.work / f"python{number}") for number, python in enumerate(pythons)]
    write_result(options.output, {"wheel": wheel.name, "num_bytes": wheel.stat().st_size, "rows": rows})
    print(f"{wheel.name}: {wheel.stat().st_size:,} bytes; {options.output}")


if __name__ == "__main__":
    main()
