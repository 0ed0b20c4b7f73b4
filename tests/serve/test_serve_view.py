"""What was judged, as HTML: whatever a class or a file is called, it is text; what is not known is not shown."""

from PIL import Image

from vitask_plugin.serve.judging import TSM_ALONE, WITH, WITHOUT, Judged, Opinion, Shown
from vitask_plugin.serve.view import head_html, result_html
from vitask_plugin.tsm.nearest import Neighbour

BAD = "<img src=x onerror=alert(1)>"
PICTURE = Image.new("RGB", (600, 300), "red")


def test_names_are_text() -> None:
    opinion = Opinion(BAD, {BAD: 0.75, "other": 0.25}, BAD)
    nearest = [Shown(Neighbour(BAD, BAD, 0.125), PICTURE), Shown(Neighbour("b", "other", 0.5), None, BAD)]
    html = result_html(Judged(BAD, PICTURE, {WITHOUT: opinion}, nearest))
    html += result_html(Judged(BAD, None, {}, error=BAD)) + head_html(BAD, BAD)
    assert "<img src=x" not in html and html.count("&lt;img src=x") == 12
    assert html.count('src="data:image/png;base64,') == 2


def test_the_likeliest_of_the_model_comes_first_and_what_each_decides_is_marked() -> None:
    opinions = {
        WITHOUT: Opinion("a", {"a": 0.6, "b": 0.3, "c": 0.1}, "a."),
        WITH: Opinion("b, c", {"a": 0.2, "b": 0.7, "c": 0.55}, "b, c."),
        TSM_ALONE: Opinion("no finding", {"a": 0.1, "b": 0.2, "c": 0.4}),
    }
    html = " ".join(result_html(Judged("x.png", PICTURE, opinions)).split())
    rows = [row.split("</tr>")[0] for row in html.split('<tr><th scope="row">')[1:]]
    assert [row[0] for row in rows] == ["b", "c", "a"]
    assert [row.count("chosen") for row in rows] == [1, 1, 1]
    assert '"without_exemplar chosen">60.0<' in rows[2] and '"with_exemplar chosen">70.0<' in rows[0]
    assert "in words: “b, c.”" in html and html.count("in words") == 2 and "Nearest" not in html


def test_without_a_tsm_the_model_is_alone() -> None:
    html = result_html(Judged("x.png", PICTURE, {WITHOUT: Opinion("a", {"a": 0.9, "b": 0.1}, "a.")}))
    assert "with_exemplar" not in html and "TSM" not in html and html.count('class="bar"') == 2
