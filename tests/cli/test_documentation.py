"""docs/cli.md and the command line say the same: commands, options, defaults; examples use options that exist."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from diffusers_leanvae.cli import COMMANDS, app
from diffusers_leanvae.cli.common import DTYPES_TEXT


ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
COMMON = "Options of several commands"
ROW = re.compile(r"^\| `(--[\w-]+)` \| (.*?) \| (.+) \|$", re.MULTILINE)


def leaves(command: str) -> list[tuple[str, Any]]:
    """The command, or those in the group of this name."""
    parsed: Any = typer.main.get_command(app)
    found = parsed.commands[command]
    inside = getattr(found, "commands", None)
    return [(command, found)] if inside is None else [(f"{command} {name}", inside[name]) for name in inside]


def options_of(command: str) -> dict[str, Any]:
    """Name of each option -> its default; `...` if it is required. Of a group, those of all commands in it."""
    parameters = [p for _, leaf in leaves(command) for p in leaf.params if p.param_type_name == "option"]
    found = {p.opts[0]: ... if p.required else p.default for p in parameters}
    return {name: default for name, default in found.items() if name != "--help"}


def sections() -> dict[str, str]:
    parts = re.split(r"^## (.+)$", (ROOT / "docs" / "cli.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_command_has_a_section():
    assert [title for title in sections() if title != COMMON] == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_options_and_defaults_are_those_of_the_command(command):
    section, shared = sections()[command], {name: default for name, default, _ in ROW.findall(sections()[COMMON])}
    documented = {name: default for name, default, _ in ROW.findall(section)}
    also = re.search(r"^(?:Also|Options:) ((?:`--[\w-]+`(?:, )?)+)\.", section, re.MULTILINE)
    documented |= {name: shared[name] for name in re.findall(r"--[\w-]+", also[1])} if also else {}
    options = options_of(command)
    assert sorted(documented) == sorted(options)
    for name, default in options.items():
        if default is ...:
            assert documented[name] == "required"
        elif default is False:
            assert documented[name] == "off"
        elif default is None:  # in words
            assert "`" not in documented[name] and documented[name] not in ("off", "required")
        else:
            assert documented[name] == f"`{default}`", name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_examples_use_options_that_exist(page):
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in re.findall(r"(?:^|\| |--no-python )leanvae ([^|\n]*)", block, re.MULTILINE):
            command, *arguments = shlex.split(line, comments=True)
            if command in ("--help", "--version"):
                continue
            used = {argument for argument in arguments if argument.startswith("--")}
            assert used <= options_of(command).keys() | {"--help"}, line


def test_help_says_what_each_option_does():
    for name, command in [leaf for group in COMMANDS for leaf in leaves(group)]:
        assert command.help, name
        for parameter in command.params:
            text = getattr(parameter, "help", None)
            assert text and text[0].isupper() and text.endswith("."), (name, parameter.name)
        for dtype in [p for p in command.params if p.name == "dtype"] if name != "bench" else ():
            assert DTYPES_TEXT in dtype.help
