"""Show docments in the reference: the comments behind parameters become field lists that Sphinx understands."""

import inspect
import re
from collections.abc import Iterator
from typing import Any

from fastcore.docments import docments
from sphinx.util.rst import escape


def describe(app, kind: str, name: str, documented: Any, options: Any, lines: list[str]) -> None:
    "Called by autodoc for each object: `lines`, its docstring, is completed in place."
    lines[:] = [as_rst(line) for line in lines]
    if kind in ("class", "exception", "function", "method"):
        fields = list(field_lines(documented))
        lines += ["", *fields, ""] if fields else []


def skip(app, kind: str, name: str, documented: Any, would_skip: bool, options: Any) -> bool | None:
    "Called by autodoc for each member: leave out what scikit-learn adds to classifiers, and fields, which the class lists."
    added = re.fullmatch(r"set_\w+_request", name) or str(getattr(documented, "__doc__", "")).startswith("Alias for field number")
    return True if added else None


def field_lines(documented: Any) -> Iterator[str]:
    "`:param …:` and `:returns:` lines from the comments of a definition."
    for parameter, comment in comments_of(documented).items():
        told = as_rst(" ".join(comment.split()))
        yield f":returns: {told}" if parameter == "return" else f":param {escape(parameter)}: {told}"


def comments_of(documented: Any) -> dict[str, str]:
    "Name of a parameter, a field or `return` -> its comment."
    if inspect.isclass(documented) and "__init__" not in vars(documented):
        return fields_of(documented)
    if inspect.getmodule(documented) is None or not documented.__module__.startswith("genre_nb."):
        return {}
    found = docments(documented, full=False, returns=not inspect.isclass(documented))
    return {name: comment for name, comment in found.items() if isinstance(comment, str) and comment}


def fields_of(documented: type) -> dict[str, str]:
    "Field of a class -> the comment on its line."
    fields = re.compile(r"^    (\w+): [^#\n]*?  # (.+)$", re.MULTILINE)
    head = inspect.getsource(documented).split("\n    def ")[0]
    return dict(fields.findall(head))


def as_rst(text: str) -> str:
    "Plain text with names in backticks as reStructuredText; names of definitions become links."
    parts = re.split(r"`([^`]+)`", text)
    return "".join(code(part) if place % 2 else escape(part) for place, part in enumerate(parts))


def code(name: str) -> str:
    "A name in backticks: a link if it is a definition, otherwise just code."
    return f"`{name}`" if re.fullmatch(r"[A-Za-z_][\w.]*\w", name) else f"``{name}``"
