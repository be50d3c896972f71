import base64

from clipmap_hf.evaluation.retrieval import recall_columns
from clipmap_hf.files.tables import html_page, html_table, inline_png, markdown_table, scaled_column


COLUMNS = [["model", "a<b", "c"], ["MB", "1.00", "12.00"]]


def test_markdown_puts_names_to_the_left_and_numbers_to_the_right():
    assert markdown_table(COLUMNS).splitlines() == [
        "| model |    MB |",
        "| ----- | ----: |",
        "| a<b   |  1.00 |",
        "| c     | 12.00 |",
    ]


def test_html_puts_names_to_the_left_and_numbers_to_the_right_and_escapes_both():
    table = html_table(COLUMNS)
    assert '<tr><th>model</th><th class="number">MB</th></tr>' in table
    assert '<tr><td>a&lt;b</td><td class="number">1.00</td></tr>' in table
    assert table.count("<tr>") == 3


def test_a_page_holds_its_style_and_pictures():
    page = html_page("1 < 2", inline_png(b"picture", 'alt="a"'), "i { color: red }")
    assert "<title>1 &lt; 2</title>" in page and "<h1>1 &lt; 2</h1>" in page and "i { color: red }</style>" in page
    assert f'<img alt="a" src="data:image/png;base64,{base64.b64encode(b"picture").decode()}">' in page


def test_a_column_has_the_largest_unit_that_shows_all_of_it():
    assert scaled_column([2_000_000_000, 20_000_000], "GM") == ["G", "2.00", "0.02"]
    assert scaled_column([2_000_000_000, 2_000_000], "GM") == ["M", "2000.00", "2.00"]
    assert scaled_column([2_000_000_000, 0], "GMK") == ["G", "2.00", "0.00"]  # a zero is seen in any unit


def test_recalls_are_columns_in_percent():
    results = [{"image_to_text_recall@1": 0.25, "text_to_image_recall@1": 1.0}]
    assert recall_columns(results, ks=(1,)) == [["R@1 i→t / t→i", "25.0 / 100.0"]]
