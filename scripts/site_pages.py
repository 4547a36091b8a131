"""Hook of mkdocs: what the site shows beyond `docs/`, without a copy of anything.

README.md is the front page. Notebooks are pages, and so is every file of the project that a page links to: Markdown as
it is, code in a block. Links in the Markdown files are those that work on GitHub; here they are pointed at the pages.
"""

import json
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


ROOT = Path(__file__).resolve().parent.parent
# The package as it is installed: `pipelines` and `training` are part of it (see `package-dir` in pyproject.toml).
PACKAGE = ROOT / "build" / "site-package" / "diffusers_leanvae"
NAMES = {
    "README.md": "index.md",
    "results/README.md": "results.md",
    "integrations/comfyui/README.md": "comfyui_nodes.md",
}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".toml": "toml"}
LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?(?=\))")
FENCE = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)
sources: dict[str, Path] = {}  # the file of the project behind each page, by the name of the page


def on_startup(**_: Any) -> None:
    """Link the package together, as it is installed, for the reader of docstrings."""
    PACKAGE.mkdir(parents=True, exist_ok=True)
    for link in PACKAGE.iterdir():
        link.unlink()
    for path in [*(ROOT / "src" / "diffusers_leanvae").iterdir(), ROOT / "pipelines", ROOT / "training"]:
        if path.name != "__pycache__":
            (PACKAGE / path.name).symlink_to(path)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the front page, the notebooks, and all that these and the pages of `docs/` link to, however far away."""
    waiting = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
    waiting += sorted(ROOT.glob("examples/notebooks/*.ipynb"))
    waiting += [Path(file.abs_src_path) for file in files.documentation_pages()]
    sources.clear()
    while waiting:
        path = waiting.pop()
        name = page_of(path)
        if name in sources or not path.is_file():  # of a link that leads nowhere, mkdocs warns
            continue
        sources[name] = path
        if files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, content=text_of(path)))
        if path.suffix in (".md", ".ipynb"):
            waiting += links(text_of(path), path)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point the links of a page at pages of the site."""
    source = sources.get(page.file.src_uri)
    if source is None or source.suffix not in (".md", ".ipynb"):
        return markdown
    here = Path(page.file.src_uri).parent

    def point(match: re.Match[str]) -> str:
        target = resolve(match[2], source)
        if target is None or not target.is_file():
            return match[0]
        return f"{match[1]}{os.path.relpath(page_of(target), here)}{match[3] or ''}"

    pieces = FENCE.split(markdown)
    pieces[::2] = [LINK.sub(point, piece) for piece in pieces[::2]]  # every second piece is a block of code
    return "".join(pieces)


def page_of(path: Path) -> str:
    """Name the page that shows a file of the project: pages of `docs/` at the top, code under `source/`."""
    if path.is_relative_to(ROOT / "docs"):
        return path.relative_to(ROOT / "docs").as_posix()
    name = path.relative_to(ROOT).as_posix()
    if path.suffix == ".ipynb":
        return f"notebooks/{path.stem}.md"
    return NAMES.get(name, name if path.suffix == ".md" else f"source/{name}.md")


def text_of(path: Path) -> str:
    """The page of a file, in Markdown: a notebook's cells, a Markdown file itself, code in a block."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    if path.suffix == ".ipynb":
        return "\n\n".join(map(cell_text, json.loads(text)["cells"]))
    return f"# {path.relative_to(ROOT).as_posix()}\n\n`````{LANGUAGES.get(path.suffix, 'text')}\n{text}\n`````\n"


def cell_text(cell: dict[str, Any]) -> str:
    source = "".join(cell["source"])
    return source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```"


def links(markdown: str, source: Path) -> list[Path]:
    """The files of the project that a page links to."""
    text = "".join(FENCE.split(markdown)[::2])
    found = [resolve(match[2], source) for match in LINK.finditer(text)]
    return [path for path in found if path is not None and path.suffix not in (".png", ".jpg")]


def resolve(target: str, source: Path) -> Path | None:
    """The file of the project that a link means; `None` for an address, and for what is outside of the project."""
    if re.match(r"[a-z]+:", target):
        return None
    path = Path(os.path.normpath(source.parent / unquote(target)))
    return path if path.is_relative_to(ROOT) else None
