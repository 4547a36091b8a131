"""The keys of a recipe as a listing for people: values, types, and the comments beside them in the source."""

import ast
import dataclasses
import inspect
import io
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

from .recipe import dump_value


def list_keys(recipe_class: type, recipe: Any = None) -> str:
    """Lay out all keys of a recipe as YAML, each with its type and comment; it can be read back as a recipe.

    Args:
        recipe_class: The dataclass of a training script.
        recipe: One of this class, whose values are shown; the defaults without it.
    """
    return "\n".join(_list_section(recipe_class, recipe)) + "\n"


def _list_section(section_class: type, section: Any) -> Iterator[str]:
    hints, comments = typing.get_type_hints(section_class), comments_of(section_class)
    for field in dataclasses.fields(section_class):
        expected, comment = hints[field.name], comments.get(field.name, "")
        value = _default(field) if section is None else getattr(section, field.name)
        subsection = _section_of(expected)
        if subsection is None:
            is_missing = value is dataclasses.MISSING
            text = f"{field.name}:" if is_missing else f"{field.name}: {dump_value(value)}"
            notes = (describe_type(expected) + (", required" if is_missing else ""), comment)
            yield f"{text}  # {'; '.join(filter(None, notes))}"
            continue
        about = comment or (inspect.getdoc(subsection) or "").split("\n")[0]
        if value is None:
            yield f"{field.name}: null  # null, or a section; {about}"
            yield from (f"#   {line}" for line in _list_section(subsection, None))
        else:
            yield f"{field.name}:  # {about}"
            shown = None if value is dataclasses.MISSING else value
            yield from (f"  {line}" for line in _list_section(subsection, shown))


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _section_of(expected: Any) -> type | None:
    """Return the dataclass that a type is, or is apart from `None`."""
    for choice in (expected, *typing.get_args(expected)):
        if isinstance(choice, type) and dataclasses.is_dataclass(choice):
            return choice
    return None


def describe_type(expected: Any) -> str:
    """Name a type as a reader of recipes knows it: `int`, `"adamw" | "muon"` without the quotes, `list of float`."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " | ".join("null" if argument is type(None) else describe_type(argument) for argument in arguments)
    if origin is dict:
        return "section of any keys"
    if origin is not None:
        return f"list of {describe_type(arguments[0])}"
    return expected.__name__


def comments_of(section_class: type) -> dict[str, str]:
    """Read the comments of the fields of a dataclass from its source: those on the lines above, then that beside."""
    found: dict[str, str] = {}
    for base in reversed(section_class.__mro__):
        if dataclasses.is_dataclass(base):
            found |= _comments_in(textwrap.dedent(inspect.getsource(base)))
    return found


def _comments_in(source: str) -> dict[str, str]:
    lines = source.splitlines()
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    (definition,) = ast.parse(source).body
    found = {}
    for node in definition.body if isinstance(definition, ast.ClassDef) else ():
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno
            while first - 1 in comments and lines[first - 2].lstrip().startswith("#"):
                first -= 1
            last = node.end_lineno or node.lineno
            text = " ".join(comments[number] for number in range(first, last + 1) if number in comments)
            if text:  # a default that a subclass changes keeps the comment
                found[node.target.id] = text
    return found
