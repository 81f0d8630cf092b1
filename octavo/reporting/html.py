"""The report as a page: one file that asks nothing of the network and runs no script."""

from __future__ import annotations

from markupsafe import Markup

from octavo.reporting.plots import plots
from octavo.reporting.rendering import TEMPLATES, render
from octavo.reporting.results import Results
from octavo.reporting.view import view


def html_report(results: Results) -> str:
    """The page, complete with style sheet and figures."""
    css = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    return render("report.html.jinja", **view(results), plots=plots(results), css=Markup(css))
