"""Templates to text. Everything that is put into one is escaped for its language."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from octavo.reporting.commands import Snippet

TEMPLATES = Path(__file__).parent / "templates"

_MARKDOWN = re.compile(r"[\\`*_\[\]<>|#~&$]")


def render(template: str, **values: Any) -> str:
    """The template of that file name, filled in."""
    html = template.endswith(".html.jinja")
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        autoescape=html,
        finalize=None if html else escape_markdown,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": code, "fence": fence}
    return environment.get_template(template).render(values)


def escape_markdown(value: object) -> str:
    """Text that Markdown shows as it is, on one line; Markup is Markdown already."""
    if isinstance(value, Markup):
        return value
    return _MARKDOWN.sub(r"\\\g<0>", " ".join(str(value).split()))


def code(value: object) -> Markup:
    """Inline code, whatever backticks it holds."""
    text = " ".join(str(value).split())
    ticks = _longer_than_any_run(text, 1)
    space = " " if "`" in text else ""
    return Markup(f"{ticks}{space}{text}{space}{ticks}".replace("|", "\\|"))


def fence(snippet: Snippet) -> Markup:
    """A code block that nothing in the code can close."""
    ticks = _longer_than_any_run(snippet.code, 3)
    return Markup(f"{ticks}{snippet.language}\n{snippet.code}\n{ticks}")


def _longer_than_any_run(text: str, shortest: int) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    return "`" * max(shortest, longest + 1)
