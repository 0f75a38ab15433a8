"""The report: one page with everything in it, safe whatever the captions say."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import results_tree
from PIL import Image

from hires import figures
from hires.analysis import tables
from hires.analysis.results import TRUE, Results, where
from hires.report import read_table, write


class Page(HTMLParser):
    """Tags with their attributes, and the text of each kind of tag."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self._open = [], {}, None
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._open = tag

    def handle_data(self, data):
        self.text.setdefault(self._open, []).append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = Results.open(results_tree.build(tmp_path_factory.mktemp("results")))
    scores = run.scores("main")
    tables.write(run.output, "variants", scores, tables.scores(scores))
    figures.save(figures.cost([1, 2], 8), run.output, "cost")
    return run


@pytest.fixture(scope="module")
def html(run):
    write(run, run.path / "report.html", "embedded <i>", lossless_prompts=1)
    return (run.path / "report.html").read_text(encoding="utf-8")


def gallery(html):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S).group(1))


def picture(source):
    return Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))


def test_captions_are_escaped(html):
    assert "<script>alert" not in html
    assert "embedded &lt;i&gt;" in html
    assert 'a <script>alert("x")</script> disc & wool' in gallery(html)["prompts"]
    assert sum(tag == "script" for tag, _ in Page(html).tags) == 2


def test_nothing_comes_from_the_network(html):
    page = Page(html)
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a" and "://" in attributes["href"]]
    assert len(links) == 3
    assert all(link.startswith("https://arxiv.org/abs/") for link in links)
    assert len(re.findall(r"https?:", html)) == len(links)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object")
        assert attributes.get("src", "data:").startswith("data:")
    assert "default-src 'none'" in html


def test_pictures_are_described(html):
    described = [attributes["alt"] for tag, attributes in Page(html).tags if tag == "img" and "src" in attributes]
    assert described == ["Cost of a model call against the upscale factor"]


def test_tables_and_sentences_are_those_of_the_results(run, html):
    page = Page(html)
    shown = tables.scores(run.scores("main"))
    assert [cell for cell in page.text["td"] if cell.strip()] == [str(c) for row in shown.to_numpy() for c in row]
    said = tables.findings(run.scores("main"), where(run.paired, setting="default"))
    sentences = [sentence for place in said.values() for sentence in place]
    assert [text for text in page.text["li"] if text in sentences] == sentences
    assert sentences


def test_gallery_holds_every_image_at_full_resolution(run, html):
    data = gallery(html)
    assert data["prompts"] == list(run.prompts["prompt"])
    assert len(data["images"]) == len(run.images) + len(run.references)
    assert {image["name"] for image in data["images"] if image["study"] is None} == {TRUE}
    for image in data["images"]:
        assert f"{picture(image['source']).height}x{picture(image['source']).width}" == image["size"]
    first = next(i for i in data["images"] if i["prompt"] == 0 and i["model"] == "tiny-flux" and i["name"] == "npa")
    stored = where(run.images, study="main", backbone="tiny-flux", variant="npa").iloc[0]["path"]
    assert np.array_equal(np.asarray(picture(first["source"]).convert("RGB")), np.asarray(Image.open(stored)))


def test_gallery_stops_at_its_budget(run, tmp_path):
    whole = gallery((run.path / "report.html").read_text(encoding="utf-8"))
    first = sum(len(image["source"]) for image in whole["images"] if image["prompt"] == 0)
    write(run, tmp_path / "small.html", "embedded", lossless_prompts=1, max_megabytes=(first + 10) / 1e6)
    small = (tmp_path / "small.html").read_text(encoding="utf-8")
    assert gallery(small)["prompts"] == whole["prompts"][:1]
    assert "1 of 3 prompts" in small


def test_report_of_scores_alone(run, tmp_path):
    (tmp_path / "metrics.parquet").write_bytes((run.path / "metrics.parquet").read_bytes())
    write(Results.open(tmp_path), tmp_path / "report.html", "reference")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert not any(tag in ("script", "table", "img") for tag, _ in page.tags)
    assert any("has the lowest KID" in text for text in page.text["li"])


def test_same_results_same_bytes(run, html, tmp_path):
    write(run, tmp_path / "again.html", "embedded <i>", lossless_prompts=1)
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == html


def test_read_table_undoes_markdown():
    header, rows = read_table("| a \\| b | c |\n| --- | --- |\n| 1 | **2** |\n")
    assert header == ["a | b", "c"]
    assert rows == [["1", "**2**"]]
