"""The report: one file, nothing outside it, honest sentences, and the same bytes for the same runs."""

import base64
import io
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from hybrid_lm.eval import plots
from hybrid_lm.eval.published import published
from hybrid_lm.eval.report import report
from hybrid_lm.eval.results import read_results, read_rows, write_results
from hybrid_lm.eval.summary import read_runs, recall_axis, recall_points
from hybrid_lm.eval.table import notes, number, print_table, results_table, size
from tests.eval.runs import probe_run, siblings, text_run


class Page(HTMLParser):
    """Tags, attributes and visible text; fails on tags that are not closed."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.said = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.said.append(data)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    runs = siblings(root)
    return runs, report(runs, root / "out" / "report.html", "A <title>")


def test_is_one_file_with_everything_inside(made):
    _, path = made
    page = Page(path.read_text())
    assert "script" not in page.tags
    assert page.tags.count("img") == 5
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.links)
    assert "<script>alert('no')</script>" in page.said, "a model's text is shown, never run"
    assert "A <title>" in page.said
    for link in page.links:
        svg = base64.b64decode(link.partition(",")[2])
        root = ET.fromstring(svg)
        assert root.tag.endswith("svg")
        outside = [value for x in root.iter() for key, value in x.attrib.items() if key.endswith("href")]
        assert all(value.startswith("#") for value in outside)


def test_says_who_is_better_and_who_is_not(made):
    _, path = made
    said = " ".join(Page(path.read_text()).said)
    assert re.search(
        r"Held-out bits per byte: hybrid 2\.\d+, mamba 2\.\d+, transformer 2\.\d+; compressors", said
    )
    assert "zlib -9 2.500, lzma 2.200" in said
    # 0.1 bits apart; the noise is 0.02 per document, of which there are 40.
    assert re.search(
        r"hybrid, a hybrid, is better than transformer in held-out text, bits per byte: -0\.(09|10)", said
    )
    assert "hybrid, a hybrid, is worse than transformer in mqar n_pairs=16, accuracy: -0." in said
    assert "hybrid, a hybrid, is better than mamba in mqar n_pairs=16, accuracy: +0." in said
    assert "n_pairs=4, accuracy" not in said, "the easier settings are in the table"
    assert "Models trained for recall: transformer c a (20 k parameters, 2 seeds)" in said
    assert "does not recall reaches 0.062, chance is 0.0078" in said


def test_is_a_pure_function_of_the_folders(made, tmp_path):
    runs, path = made
    assert report(runs, tmp_path / "again.html", "A <title>").read_bytes() == path.read_bytes()


def test_a_pair_that_cannot_be_compared_is_named(tmp_path):
    a = text_run(tmp_path / "a", "hybrid", 2.0)
    b = text_run(tmp_path / "b", "mamba", 2.0, prefix="other")
    said = " ".join(Page(report([a, b], tmp_path / "r.html").read_text()).said)
    assert "Not compared: held-out text: a and b were not tested on the same data" in said


def shorten(run, n):
    """Leaves n documents of a run's results."""
    text = read_results(run)["text"]
    write_results(run, text={**text, "documents": text["documents"][:n]})
    return run


def test_three_documents_tell_nothing(tmp_path):
    runs = [
        shorten(text_run(tmp_path / name, name, bits), 3) for name, bits in (("hybrid", 2.0), ("mamba", 3.0))
    ]
    said = " ".join(Page(report(runs, tmp_path / "r.html").read_text()).said)
    told = (
        "hybrid, a hybrid, against mamba in held-out text, bits per byte: 3 documents, questions or sequences"
    )
    assert f"{told} are too few to tell." in said
    assert "interval" not in said.partition("Results")[0]


def test_a_run_of_one_record_is_seen(tmp_path):
    run = text_run(tmp_path / "hybrid", "hybrid", 2.0)
    marker = re.compile(r"<use [^>]*fill: " + plots.COLORS[0], re.IGNORECASE)
    # A curve needs none; of one point there is nothing else to see, in the axes and in the legend.
    assert len(marker.findall(plots.train_loss(read_runs([run])) or "")) == 0
    (record, *_) = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(record + "\n")
    assert len(marker.findall(plots.train_loss(read_runs([run])) or "")) == 2


def test_a_score_says_of_how_many_questions_it_is(tmp_path):
    run = text_run(tmp_path / "hybrid", "hybrid", 2.0)
    samples = [{"hash": f"q{i // 2}", "metrics": {"acc": i % 2}} for i in range(16)]  # two filters of each
    scores = {"hybrid_lm_names": {"acc,none": 0.375}}
    write_results(run, harness={"results": scores, "samples": {"hybrid_lm_names": samples}})
    _, ((*_, score, _, _),) = results_table(read_runs([run]))
    assert score == "0.3750 (n 8)"
    warning = "hybrid: hybrid_lm_names has 8 questions: its score is mostly luck."
    assert notes(read_runs([run])) == [warning]
    assert warning in Page(report([run], tmp_path / "r.html").read_text()).said
    more = [{**sample, "hash": f"r{i}"} for i, sample in enumerate(samples)]
    write_results(run, harness={"results": scores, "samples": {"hybrid_lm_names": more}})
    assert notes(read_runs([run])) == []


def test_what_is_missing_is_left_out(tmp_path):
    probe_run(tmp_path / "only-recall", 0.9, seeds=[3])
    page = Page(report([tmp_path / "only-recall"], tmp_path / "r.html").read_text())
    assert page.tags.count("img") == 2
    assert "Layers" not in page.said
    header, ((name, recall),) = results_table(read_runs([tmp_path / "only-recall"]))
    assert header == ["run", "recall, n_pairs 16"]
    # One seed: its own 95 % interval, 0.9 (1 - 16/64) -+ 0.02, rounded.
    assert (name, recall.partition(" ")[2]) == ("only-recall", "[0.66, 0.70]")


def test_folders_without_results_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x" / "empty").mkdir(parents=True)
    with pytest.raises(ValueError, match="empty: holds neither results nor metrics"):
        report([tmp_path / "empty"], tmp_path / "r.html")
    with pytest.raises(ValueError, match="none: no such folder"):
        report([tmp_path / "none"], tmp_path / "r.html")
    with pytest.raises(ValueError, match="folders of the same name"):
        report([tmp_path / "empty", tmp_path / "x" / "empty"], tmp_path / "r.html")
    with pytest.raises(ValueError, match="at least one run"):
        report([], tmp_path / "r.html")
    (tmp_path / "empty" / "results.json").write_text('{"text": ')
    with pytest.raises(ValueError, match=r"results\.json: damaged.*evaluate again"):
        report([tmp_path / "empty"], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_the_table_has_the_same_cells_on_the_terminal(made):
    runs, _ = made
    header, lines = results_table(read_runs(runs))
    assert header[:4] == ["run", "pattern", "parameters", "bits/byte"]
    assert header[4:] == ["recall, n_pairs 16", "names acc", "train tokens/s", "state"]
    assert lines[2][:3] == ["hybrid", "m a", "123 k"]
    assert lines[2][-3:] == ["0.5000", "10 k", "4 KiB + 512 B/token"]
    out = io.StringIO()
    print_table(Console(file=out, width=200), "Results", header, lines)
    assert all(cell in out.getvalue() for line in lines for cell in line)


def test_seeds_make_points(tmp_path):
    rows = read_rows(probe_run(tmp_path, 0.8) / "results.jsonl")
    assert recall_axis(rows) == "n_pairs"
    points = recall_points(rows, "n_pairs")
    assert [point.x for point in points] == [4, 8, 16]
    for point in points:
        seen = sorted(row["accuracy"] for row in rows if row["setting"]["n_pairs"] == point.x)
        assert (point.low, point.high, point.seeds) == (*seen, 2)
        assert point.accuracy == pytest.approx(sum(seen) / 2)
    assert recall_axis([]) is None


def test_numbers_for_people():
    assert [number(x) for x in (None, 0, 9_999, 10_000, 1_234_567, 7.1e9)] == [
        *("-", "0", "9,999", "10 k", "1.23 M", "7.1 G")
    ]
    assert [size(x) for x in (None, 0, 1023, 1024, 3 * 2**20)] == ["-", "0 B", "1023 B", "1 KiB", "3 MiB"]


def test_bands_keep_the_mean_and_smoothing_keeps_a_line():
    x, y = plots.banded([np.log(2)] * 100 + [None] * 50)
    assert y == pytest.approx([1.0] * len(y))
    assert x[0] == 1.0
    assert x == sorted(x)
    assert x[-1] < 101
    line = np.arange(50.0)
    assert plots.smooth(line, 4)[4:-4] == pytest.approx(line[4:-4])
    assert plots.smooth(line, 0) == pytest.approx(line)


def test_sections_are_added_not_lost(tmp_path):
    write_results(tmp_path, text={"bits_per_byte": 2.0})
    write_results(tmp_path, probe=[{"loss": float("nan")}])
    assert read_results(tmp_path) == {"text": {"bits_per_byte": 2.0}, "probe": [{"loss": None}]}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_published_numbers_are_numbers_with_a_source():
    for name, columns in (("zoology_figure2", 80), ("zoology_recall_memory", 28)):
        rows = published(name)
        assert len(rows) == columns
        assert all(0.0 <= float(row["accuracy"]) <= 1.0 for row in rows)
