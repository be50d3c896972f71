"""Makes an HTML page: what several models retrieve for the same images and captions, then charts and a table."""

import html
import io
from collections.abc import Mapping, Sequence

import torch
from PIL import Image

from clipmap_hf.demo.charts import CHART_STYLE
from clipmap_hf.files.tables import html_page, html_table, inline_png


__all__ = ["retrieval_page"]

_STYLE = """
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1rem }
.card { border: 1px solid var(--line); border-radius: .6rem; padding: .8rem; background: var(--card) }
.card header { display: flex; align-items: center; gap: .7rem; font-weight: 600; font-size: 1.1rem }
.card h3 { font-size: .85rem; font-weight: 600; margin: .7rem 0 .25rem }
.card img { background: #fff; border-radius: .3rem; width: 48px; height: 48px }
.found { display: flex; gap: 6px } .found img { width: 100%; max-width: 48px; height: auto; min-width: 0 }
.found img.right { outline: 3px solid var(--right) } .right { color: var(--right); font-weight: 700 }
.captions { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: 0 1rem; font-size: .85rem }
.captions ol { margin: 0; padding-left: 1.3rem }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; font-size: .9rem; margin: .2rem 0 }
.legend i { display: inline-block; width: .8rem; height: .8rem; border-radius: .2rem; margin-right: .35rem }
.wide { overflow-x: auto; font-size: .85rem } .wide td, .wide th { white-space: nowrap; padding: .35rem .5rem }
"""
_TITLE = "What a compressed CLIP still finds"


def retrieval_page(
    images: Sequence[Image.Image],
    captions: Sequence[str],
    embeddings: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    picks: Sequence[int],
    *,
    lead: Sequence[str],
    charts: tuple[str, str],
    table: Sequence[Sequence[str]],
    k: int = 5,
) -> str:
    """
    Makes the page.

    Args:
        images: All images that are searched.
        captions: The captions of the images, in the same order.
        embeddings: Normalized image and text embeddings `(pairs, dim)` of all pairs, by the name of the model.
        picks: Indices of the pairs to show.
        lead: What the models are, a line for each.
        charts: HTML of the learning curves, and of the sizes.
        table: Columns of a table of results, header first. The page ends with it.
        k: Number of results to show per query.

    Returns:
        The HTML of the page, which includes the images.
    """
    cards = "\n".join(_card(images, captions, embeddings, pick, min(k, len(images))) for pick in picks)
    curves, sizes = charts
    body = f"""<p>{"<br>".join(map(html.escape, lead))}</p>
<p>Each card is a pair that no model was trained on. It shows the images nearest to its caption, then the captions
nearest to its image, among {len(images):,} pairs; what belongs to it is <span class="right">green</span>. The pairs
are evenly spaced, not chosen.</p>
<div class="cards">
{cards}
</div>
<h2>What each learns from how many pairs</h2>
<p>Recall at 10: how often what is looked for is among the first ten, as the mean of both directions.</p>
{curves}
<h2>Sizes</h2>
{sizes}
<h2>All numbers</h2>
<p>Recall in percent, from images to texts / from texts to images. Seconds are those of start and training, without
evaluations and what all students share of the teacher.</p>
<div class="wide">{html_table(table)}</div>"""
    return html_page(_TITLE, body, CHART_STYLE + _STYLE)


def _card(
    images: Sequence[Image.Image],
    captions: Sequence[str],
    embeddings: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    pick: int,
    k: int,
) -> str:
    """Shows what each model finds for an image and for its caption."""
    pictures, lists = [], []
    for name, (image_embeds, text_embeds) in embeddings.items():
        found = (image_embeds @ text_embeds[pick]).topk(k).indices.tolist()
        shown = "".join(_picture(images[i], captions[i], _class_attribute(i, pick)) for i in found)
        pictures.append(f'<h3>{html.escape(name)}</h3><div class="found">{shown}</div>')
        texts = (text_embeds @ image_embeds[pick]).topk(k).indices.tolist()
        items = "".join(f"<li{_class_attribute(i, pick)}>{html.escape(captions[i])}</li>" for i in texts)
        lists.append(f"<div><h3>{html.escape(name)}</h3><ol>{items}</ol></div>")
    header = f"<header>{_picture(images[pick], captions[pick])}{html.escape(captions[pick])}</header>"
    return f'<article class="card">{header}{"".join(pictures)}<div class="captions">{"".join(lists)}</div></article>'


def _class_attribute(index: int, pick: int) -> str:
    return ' class="right"' if index == pick else ""


def _picture(image: Image.Image, caption: str, attributes: str = "") -> str:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    said = html.escape(caption, quote=True)
    return inline_png(buffer.getvalue(), f'{attributes} title="{said}" alt="{said}"'.strip())
