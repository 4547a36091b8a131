"""The site: every page has its place, and it builds without a warning."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).resolve().parents[1]


def test_every_page_has_its_place():
    # A page that the list of contents forgets is on the site, and nobody finds it.
    sections = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    listed = set()
    for section in sections:
        for pages in section.values():
            listed |= {page if isinstance(page, str) else next(iter(page.values())) for page in pages}
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    notebooks = {f"notebooks/{path.stem}.md" for path in (ROOT / "examples" / "notebooks").glob("*.ipynb")}
    assert (pages | notebooks) - listed == set()


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("mkdocs") is None or find_spec("mkdocstrings") is None, reason="the extra `docs` is not installed"
)
def test_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    front = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert 'href="quickstart.html"' in front and 'href="notebooks/train_on_my_clips.html"' in front
    models = (tmp_path / "site" / "api" / "models.html").read_text(encoding="utf-8")
    assert 'id="diffusers_leanvae.AutoencoderKLLeanVAE.encode"' in models
