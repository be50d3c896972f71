"""Formats tables (given as columns of text) as Markdown and HTML, and makes HTML pages that need no other files."""

import base64
import html
from collections.abc import Sequence


__all__ = [
    "html_page",
    "html_table",
    "inline_png",
    "markdown_header",
    "markdown_row",
    "markdown_table",
    "scaled_column",
]

_STYLE = """
:root { color-scheme: light dark }
:root { --ink: #222; --paper: #fff; --card: #fafafa; --line: #ddd; --right: #0a7d32; --accent: #2f7ed8 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e4; --paper: #16181b; --card: #1f2226; --line: #3a3f45; --right: #4cc97a; --accent: #5b9ee6 }
}
body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; padding: 0 1rem; max-width: 72rem }
body { color: var(--ink); background: var(--paper) }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { border-bottom: 1px solid var(--line); padding: .4rem .7rem }
th { text-align: left; font-weight: 600 } td { vertical-align: top } .number { text-align: right }
"""


def markdown_table(columns: Sequence[Sequence[str]]) -> str:
    """Formats columns (header first) as Markdown. The first column is left-aligned, the others are right-aligned."""
    widths = [max(map(len, column)) for column in columns]
    header, *rows = zip(*columns, strict=True)
    return "\n".join([markdown_header(header, widths), *(markdown_row(row, widths) for row in rows)])


def markdown_header(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Formats the first two lines of `markdown_table`: the header and the rule below it."""
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return f"{markdown_row(cells, widths)}\n{markdown_row(rule, widths)}"


def markdown_row(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Formats a line of `markdown_table`, for a table whose rows are not known yet."""
    first, *others = zip(cells, widths, strict=True)
    return f"| {' | '.join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)])} |"


def html_table(columns: Sequence[Sequence[str]]) -> str:
    """
    Formats columns (header first) as HTML, and escapes their text. The first column is left-aligned, the others are
    right-aligned.
    """
    header, *rows = zip(*columns, strict=True)
    lines = [_html_row("th", header), *(_html_row("td", row) for row in rows)]
    return "<table>" + "\n".join(lines) + "</table>"


def html_page(title: str, body: str, style: str = "") -> str:
    """
    Makes an HTML page that is a single file.

    Args:
        title: Heading of the page. It is escaped here.
        body: HTML below the heading.
        style: CSS rules, in addition to those of all pages.
    """
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{_STYLE}{style}</style>
<h1>{html.escape(title)}</h1>
{body}
</html>
"""


def inline_png(png: bytes, attributes: str = "") -> str:
    """
    Makes an `img` element that contains its picture.

    Args:
        png: Content of the PNG file.
        attributes: Further HTML attributes of the element.
    """
    return f'<img {attributes} src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def scaled_column(values: Sequence[int], units: str) -> list[str]:
    """
    Scales numbers to a common decimal unit.

    Args:
        values: The numbers.
        units: Units to choose from, largest first: `G`, `M` and `K`.

    Returns:
        The first unit in which all numbers but zeros are at least 0.01 (otherwise the last unit), and then the scaled
        numbers.
    """
    scales = {"G": 1e9, "M": 1e6, "K": 1e3}
    smallest = min((value for value in values if value), default=0)
    unit = next((unit for unit in units if smallest >= 0.01 * scales[unit]), units[-1])
    return [unit, *(f"{value / scales[unit]:.2f}" for value in values)]


def _html_row(element: str, cells: Sequence[str]) -> str:
    classes = ["", *[' class="number"'] * (len(cells) - 1)]
    inner = "".join(f"<{element}{c}>{html.escape(cell)}</{element}>" for c, cell in zip(classes, cells, strict=True))
    return f"<tr>{inner}</tr>"
