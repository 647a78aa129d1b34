"""Reports: one file that asks nothing of anybody, holds every number, and answers the five questions."""

import re
from html.parser import HTMLParser

import pytest
import torch
from click.testing import CliRunner

import se_inject as si
from se_inject.cli.entry import cli
from se_inject.cost import Latency
from se_inject.errors import ExportError, OptionError
from se_inject.reports import report_html
from tests.common import build
from tests.gates.test_excitations import Net, examples, in_batches

X = torch.empty(2, 3, 12, 12)
VOID = {"meta", "link", "br", "img"}


class Page(HTMLParser):
    """The elements of a page, with their attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), len(self.words)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), len(self.words)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script") and data.strip():
            self.words.append(data.strip())

    @property
    def text(self):
        return " ".join(self.words)

    def all(self, tag):
        return [attributes for name, attributes, _ in self.elements if name == tag]


@pytest.fixture(scope="module")
def made():
    """A network, its plan, and everything that can be in a report."""
    torch.manual_seed(0)
    model = Net().eval()
    plan = si.plan(model, X, reduction=2, init="paper")
    injected = plan.apply(model)
    verdict = si.verify(model, injected, torch.rand(2, 3, 12, 12), fresh=False)
    gates = si.excitations(injected, in_batches(*examples()))
    latency = Latency(10.0, 11.0, 1.1, 1.05, 1.15, 40)
    command = "se-inject net.pt --r 2 --report 'my report.html'"
    return plan, {"verdict": verdict, "gates": gates, "latency": latency, "command": command, "notes": ["mind <this>"]}


def test_it_asks_nothing_of_anybody(made):
    plan, found = made
    text = report_html(plan, **found)
    page = Page(text)
    assert not page.open
    addresses = [
        a for _, attributes, _ in page.elements for k, a in attributes.items() if k in ("src", "href", "action", "data")
    ]
    assert addresses == ["data:,"]
    assert not re.search(
        r"url\(|@import|fetch\(|XMLHttpRequest|WebSocket|//[a-z]+\.", text.replace("http://www.w3.org/2000/svg", "")
    )
    assert any("default-src 'none'" in attributes.get("content", "") for attributes in page.all("meta"))
    assert len(text) < 100_000


def test_it_holds_every_number(made):
    plan, found = made
    page = Page(report_html(plan, **found))
    cost = plan.cost()
    for row in cost.rows:
        assert row.site in page.words
        for number in (row.cost.params, row.cost.macs, row.cost.bytes):
            assert f"{number:,}" in page.words
    for total in (cost.before, cost.added, cost.after):
        for number in (total.params, total.macs, total.bytes):
            assert f"{number:,}" in page.words
    for step in plan.steps:
        assert step.path in page.words
    for check in found["verdict"].checks:
        assert check.name in page.words
        assert check.detail in page.words
    for block in found["gates"]:
        assert f"{block.average:.3f}" in page.words
        assert f"{100 * block.variation:.3g} %" in page.words
    for words in ("ratio 1.100 (quartiles 1.050 to 1.150, 40 rounds in turns)", "mind <this>", found["command"]):
        assert words in page.text
    assert "320/320" not in page.text


def test_it_answers_the_five_questions(made):
    plan, found = made
    page = Page(report_html(plan, **found))
    top = page.text[: page.text.index("The network")]
    assert "Net with 3 blocks" in top  # how many
    assert "SE, in stages 1, 2" in top  # where
    assert "Parameters" in top and "+10.0 %" in top  # what they cost, and in time
    assert "all right" in top  # whether they are right
    least = min(found["gates"], key=lambda block: block.variation)
    assert f"Which to drop first: {least.path} (stage {least.stage})" in top


def test_what_is_not_known_is_said(made):
    page = Page(report_html(made[0]))
    for words in (
        "not measured",
        "nothing was verified in this run",
        "No file but this report was written in this run.",
        "A guess from the paper",
    ):
        assert words in page.text
    assert "the blocks of stage 2, the last" in page.text


def test_a_failed_check_is_loud(made):
    from dataclasses import replace

    plan, found = made
    verdict = found["verdict"]
    check = replace(verdict.checks[0], passed=False, detail="a weight is gone")
    page = Page(report_html(plan, verdict=replace(verdict, checks=(check, *verdict.checks[1:]))))
    assert "FAILED 1 of" in page.text
    assert "a weight is gone" in page.text
    assert "all right" not in page.text


def test_tables_have_headers_captions_and_buttons_that_sort(made):
    plan, found = made
    text = report_html(plan, **found)
    page = Page(text)
    assert len(page.all("table")) == len(page.all("caption")) == 4
    assert all(attributes.get("scope") in ("col", "row") for attributes in page.all("th"))
    assert all(attributes.get("type") == "button" for attributes in page.all("button"))
    assert (len(page.all("button")) == sum("data-sort" in t for t in page.all("table")) and 0) or len(
        page.all("button")
    ) > 15
    for body in re.findall(r"<table.*?</table>", text, re.S):
        width = body.split("</thead>")[0].count("<th ")
        rows = re.findall(r"<tr>(.*?)</tr>", body.split("</thead>")[1], re.S)
        assert {row.count("<td") + row.count("<th") for row in rows} == {width}


def test_pictures_have_a_text_and_sections_a_heading(made):
    plan, found = made
    page = Page(report_html(plan, **found))
    assert all(attributes.get("aria-label") for attributes in page.all("svg"))
    assert [attributes["lang"] for attributes in page.all("html")] == ["en"]
    names = {attributes.get("id") for attributes in page.all("h2")}
    assert {attributes["aria-labelledby"] for attributes in page.all("section")} == names
    assert len(page.all("h1")) == 1
    assert any(a.get("name") == "viewport" for a in page.all("meta"))


def test_names_out_of_a_network_are_text(made):
    class Odd(Net):
        pass

    Odd.__name__ = "<script>alert(1)</script>"
    text = report_html(si.plan(Odd(), X), command="a && b <c>")
    assert "<script>alert" not in text
    assert len(Page(text).all("script")) == 1


def test_a_large_network_stays_small():
    plan = si.plan(build("torchvision:resnet152"), torch.empty(2, 3, 32, 32))
    assert len(report_html(plan)) < 300_000


def test_files(made, tmp_path):
    plan, found = made
    si.report(plan, tmp_path / "report.html", **found)
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    with pytest.raises(ExportError, match="exists"):
        si.report(plan, tmp_path / "report.html")
    with pytest.raises(OptionError, match="can't write a report"):
        si.report(plan, tmp_path / "report.pdf")
    with pytest.raises(OptionError, match="needs the network"):
        si.report(si.Plan.from_json(plan.to_json()), tmp_path / "other.html")
    assert not (tmp_path / "other.html").exists()
    stored = si.Plan.from_json(plan.to_json())
    si.report(stored, tmp_path / "other.html", model=plan.trace.model)


def test_the_command(tmp_path):
    (tmp_path / "nets.py").write_text(
        "import torch\nfrom torchvision.models.resnet import BasicBlock\n"
        "def net():\n    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), BasicBlock(8, 8), BasicBlock(8, 8))\n"
    )
    command = [f"{tmp_path}/nets.py:net", "--input", "3x12x12", "--report", f"{tmp_path}/report.html"]
    done = CliRunner().invoke(cli, [*command, "-o", f"{tmp_path}/out.pt"])
    assert done.exit_code == 0, done.output
    page = Page((tmp_path / "report.html").read_text())
    assert "all right" in page.text
    assert "out.pt" in page.text
    done = CliRunner().invoke(cli, [*command, "--dry-run"])
    assert isinstance(done.exception, ExportError)
    done = CliRunner().invoke(cli, [*command, "--dry-run", "--force"])
    assert (
        "Nothing was verified in this run. In Python, pass si.verify"
        in Page((tmp_path / "report.html").read_text()).text
    )


def test_under_the_title_it_says_what_was_analysed(made):
    plan, found = made
    for text, source in ((report_html(plan, **found), found["command"]), (report_html(plan), "Made from Python")):
        top = Page(text).text.split("Blocks")[0]
        assert "Net, observed on 1 input of 2×3×12×12 (a batch of 2)." in top
        assert re.search(r"\d{4}-\d\d-\d\d, torch " + re.escape(torch.__version__), top)
        assert source in top
    stored = si.Plan.from_json(plan.to_json())
    assert "2, 3, 12, 12" in Page(report_html(stored, model=plan.trace.model)).text


def test_what_dropping_saves_is_in_figures(made):
    plan, found = made
    words = Page(report_html(plan, **found)).text
    least = min(found["gates"], key=lambda block: block.variation)
    rows = plan.cost().rows
    row = next(row for step, row in zip(plan.steps, rows, strict=True) if step.path == least.path)
    share = row.cost.bytes / sum(row.cost.bytes for row in rows)
    told = re.search(r"saves ([\d,]+) bytes of activations for one example \(([\d.]+) %", words)
    assert int(told[1].replace(",", "")) == row.cost.bytes
    assert float(told[2]) == pytest.approx(100 * share, rel=0.05)
    assert f"{row.cost.params:,} parameters (" in words
    assert "not measured: `se-inject prune` measures it" in words


def test_columns_bars_and_ranges_are_explained_where_they_can_be_read(made):
    plan, found = made
    page = Page(report_html(plan, **found))
    for words in (
        "between images : the share of", "variation : the spread as a share", "saturated : gates within 5 %",
        "The gates lie between 0 and 1.", "in float32", "Bytes are activations only", "A full bar is the largest variation.",
        "A full bar is all that the blocks add.", "A full bar is the largest number of its column.", "bold = used",
    ):  # fmt: skip
        assert words in page.text
    assert "all began at 1" not in page.text  # it has the paper's start
    same = si.plan(Net().eval(), X, reduction=2)
    gates = si.excitations(same.apply(same.trace.model), in_batches(*examples()))
    text = Page(report_html(same, gates=gates)).text
    assert "The gates lie between 0 and 2. With the identity start, all began at 1." in text
    assert "block name" in page.words and "after" in page.words
