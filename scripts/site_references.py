"""Extension of griffe: cross references of docstrings, [`name`], become links where the API pages show the name."""

import re
from typing import Any

import griffe


REFERENCE = re.compile(r"\[`([A-Za-z_][\w.]*)`\](?![\[(])")


class References(griffe.Extension):
    """A name is looked up from the inside out: in the object itself, around it, at last anywhere in the package."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        documented: dict[str, griffe.Object] = {}
        waiting: list[griffe.Object] = [pkg]
        while waiting:
            current = waiting.pop()
            documented[current.path] = current
            waiting += [member for member in current.members.values() if isinstance(member, griffe.Object)]
        for current in documented.values():
            if current.docstring:
                current.docstring.value = REFERENCE.sub(
                    lambda match, current=current: link(match[1], current, documented), current.docstring.value
                )


def link(name: str, start: griffe.Object, documented: dict[str, griffe.Object]) -> str:
    """The link for a name; one that no page shows stays code, without a warning: it may be private."""
    scope: griffe.Object | None = start
    while scope is not None:
        if f"{scope.path}.{name}" in documented:
            return reference(name, f"{scope.path}.{name}")
        scope = scope.parent
    ends = [path for path in documented if path.endswith(f".{name}")]
    return reference(name, ends[0]) if len(ends) == 1 else f"`{name}`"


def reference(name: str, path: str) -> str:
    return f'<autoref identifier="{path}" optional><code>{name}</code></autoref>'
