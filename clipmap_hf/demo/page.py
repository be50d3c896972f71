"""An HTML page that shows what several models retrieve for the same images and captions."""

import base64
import html
import io
from collections.abc import Mapping, Sequence

import torch
from PIL import Image


__all__ = ["retrieval_page"]

_STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } th, td { border-bottom: 1px solid #ddd; padding: .4rem .7rem }
th { text-align: left; font-weight: 600 } td { vertical-align: top } td.number { text-align: right }
ol { margin: 0; padding-left: 1.2rem } .right { font-weight: 700; color: #0a7d32 } img { vertical-align: middle }
img.right { outline: 3px solid #0a7d32 }
"""


def retrieval_page(
    title: str,
    table: Sequence[Mapping[str, str]],
    images: Sequence[Image.Image],
    captions: Sequence[str],
    embeddings: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    picks: Sequence[int],
    k: int = 5,
) -> str:
    """
    Args:
        title: Heading of the page.
        table: Rows of results, `{column: text}`, shown first.
        images: All images that are searched.
        captions: Their captions, in the same order.
        embeddings: Per model, normalized image and text embeddings `(pairs, dim)` of all pairs.
        picks: The pairs to show.
        k: Results shown per query.

    Returns:
        The page, images included.
    """
    names = "".join(f"<th>{html.escape(name)}: captions</th><th>images</th>" for name in embeddings)
    rows, k = [], min(k, len(images))
    for pick in picks:
        cells = [f"<td>{_picture(images[pick])}</td><td>{html.escape(captions[pick])}</td>"]
        for image_embeds, text_embeds in embeddings.values():
            texts = (text_embeds @ image_embeds[pick]).topk(k).indices.tolist()
            found = (image_embeds @ text_embeds[pick]).topk(k).indices.tolist()
            items = "".join(f"<li{_mark(i, pick)}>{html.escape(captions[i])}</li>" for i in texts)
            pictures = " ".join(_picture(images[i], _mark(i, pick)) for i in found)
            cells.append(f"<td><ol>{items}</ol></td><td>{pictures}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>
<h1>{html.escape(title)}</h1>
{_table(table)}
<h2>What the models retrieve among {len(images)} test pairs</h2>
<p>For each image the nearest captions, for its caption the nearest images; the right one is green.</p>
<table><tr><th>image</th><th>caption</th>{names}</tr>
{chr(10).join(rows)}
</table></html>
"""


def _mark(index: int, pick: int) -> str:
    return ' class="right"' if index == pick else ""


def _picture(image: Image.Image, attributes: str = "") -> str:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img{attributes} width="48" height="48" alt="" src="data:image/png;base64,{data}">'


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in rows[0])
    body = "".join(
        "<tr>"
        + "".join(f"<td{'' if i == 0 else ' class=number'}>{html.escape(c)}</td>" for i, c in enumerate(row.values()))
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"
