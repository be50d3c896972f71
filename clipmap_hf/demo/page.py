"""Makes an HTML page that shows what several models retrieve for the same images and captions."""

import html
import io
from collections.abc import Mapping, Sequence

import torch
from PIL import Image

from clipmap_hf.files.tables import html_page, html_table, inline_png


__all__ = ["retrieval_page"]

_STYLE = """
ol { margin: 0; padding-left: 1.2rem } .right { font-weight: 700; color: #0a7d32 } img { vertical-align: middle }
img.right { outline: 3px solid #0a7d32 }
"""


def retrieval_page(
    title: str,
    table: Sequence[Sequence[str]],
    images: Sequence[Image.Image],
    captions: Sequence[str],
    embeddings: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    picks: Sequence[int],
    k: int = 5,
) -> str:
    """
    Makes the page.

    Args:
        title: Heading of the page.
        table: Columns of a table of results, header first. The page begins with it.
        images: All images that are searched.
        captions: The captions of the images, in the same order.
        embeddings: Normalized image and text embeddings `(pairs, dim)` of all pairs, by the name of the model.
        picks: Indices of the pairs to show.
        k: Number of results to show per query.

    Returns:
        The HTML of the page, which includes the images.
    """
    names = "".join(f"<th>{html.escape(name)}: captions</th><th>images</th>" for name in embeddings)
    rows, k = [], min(k, len(images))
    for pick in picks:
        cells = [f"<td>{_picture(images[pick])}</td><td>{html.escape(captions[pick])}</td>"]
        for image_embeds, text_embeds in embeddings.values():
            texts = (text_embeds @ image_embeds[pick]).topk(k).indices.tolist()
            found = (image_embeds @ text_embeds[pick]).topk(k).indices.tolist()
            items = "".join(f"<li{_class_attribute(i, pick)}>{html.escape(captions[i])}</li>" for i in texts)
            pictures = " ".join(_picture(images[i], _class_attribute(i, pick)) for i in found)
            cells.append(f"<td><ol>{items}</ol></td><td>{pictures}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    body = f"""{html_table(table)}
<h2>What the models retrieve among {len(images)} test pairs</h2>
<p>Each row shows the captions nearest to an image, and the images nearest to its caption. Right results are green.</p>
<table><tr><th>image</th><th>caption</th>{names}</tr>
{chr(10).join(rows)}
</table>"""
    return html_page(title, body, _STYLE)


def _class_attribute(index: int, pick: int) -> str:
    return ' class="right"' if index == pick else ""


def _picture(image: Image.Image, attributes: str = "") -> str:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return inline_png(buffer.getvalue(), f'{attributes} width="48" height="48" alt=""'.strip())
