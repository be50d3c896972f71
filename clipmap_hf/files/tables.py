"""Tables, given as columns of text, in Markdown and HTML, and HTML pages that hold their style and pictures."""

import base64
import html
from collections.abc import Sequence


__all__ = ["html_page", "html_table", "inline_png", "markdown_table", "scaled_column"]

_STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } th, td { border-bottom: 1px solid #ddd; padding: .4rem .7rem }
th { text-align: left; font-weight: 600 } td { vertical-align: top } .number { text-align: right }
"""


def markdown_table(columns: Sequence[Sequence[str]]) -> str:
    """The table of `columns` (header first), names to the left and numbers to the right."""
    widths = [max(map(len, column)) for column in columns]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    header, *rows = zip(*columns, strict=True)
    lines = []
    for row in (header, rule, *rows):
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def html_table(columns: Sequence[Sequence[str]]) -> str:
    """The table of `columns` (header first) as HTML, names to the left and numbers to the right; text is escaped."""
    header, *rows = zip(*columns, strict=True)
    lines = [_html_row("th", header), *(_html_row("td", row) for row in rows)]
    return "<table>" + "\n".join(lines) + "</table>"


def html_page(title: str, body: str, style: str = "") -> str:
    """
    A page in one file.

    Args:
        title: Its heading, escaped here.
        body: HTML of what follows the heading.
        style: CSS rules beside those of all pages.
    """
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}{style}</style>
<h1>{html.escape(title)}</h1>
{body}
</html>
"""


def inline_png(png: bytes, attributes: str = "") -> str:
    """
    An `img` element that holds its picture.

    Args:
        png: Content of the PNG file.
        attributes: HTML attributes of the element.
    """
    return f'<img {attributes} src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def scaled_column(values: Sequence[int], units: str) -> list[str]:
    """The largest of the decimal `units` in which no value falls below 0.01, then the values in it."""
    scales = {"G": 1e9, "M": 1e6, "K": 1e3}
    unit = next((unit for unit in units if min(values) >= 0.01 * scales[unit]), units[-1])
    return [unit, *(f"{value / scales[unit]:.2f}" for value in values)]


def _html_row(element: str, cells: Sequence[str]) -> str:
    classes = ["", *[' class="number"'] * (len(cells) - 1)]
    inner = "".join(f"<{element}{c}>{html.escape(cell)}</{element}>" for c, cell in zip(classes, cells, strict=True))
    return f"<tr>{inner}</tr>"
