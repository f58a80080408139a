"""loss.png, report.html and the terminal summary, from whole and from partial data."""

import html.parser
import json
import math
import re
import struct

import pytest

from gpt_jax.config import Config, to_json
from gpt_jax.metrics import plot, report
from gpt_jax.metrics.page import format_samples, mark_prompt
from gpt_jax.metrics.sessions import (
    find_marks,
    find_sessions,
    make_session_row,
    read_history,
    session_seconds,
)
from gpt_jax.metrics.summary import (
    Summary,
    find_samples,
    find_sources,
    format_summary,
    library_versions,
    summarize,
)
from gpt_jax.metrics.writers import JsonlWriter, read_jsonl

VOID = {"meta", "img", "br"}
LINKS = {"src", "href", "srcset", "action", "data"}


class Page(html.parser.HTMLParser):
    """Checks that tags are balanced, and collects tags, attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.open = []
        self.tags = []
        self.links = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in LINKS]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data


def fill(workdir, steps=100, evaluate=True):
    writer = JsonlWriter(workdir / "metrics.jsonl")

    for step in range(1, steps + 1):
        writer.write(
            step,
            {
                "train/loss": 9 / step,
                "throughput/tokens_seen": 50.0 * step,
                "throughput/tokens_per_second": 10.0 if step == 1 else 2000.0,
            },
        )
        if evaluate and step % 20 == 0:
            writer.write(step, {"eval/loss": 10 / step, "eval/bits_per_byte": 2 + 1 / step})
            writer.text(step, "sample/0", f"sample at {step}")
    writer.write(
        steps, {"time/step": 0.75, "time/compile": 0.25, "time/host": 0.01, "time/data_wait": 0.002}
    )
    writer.close()
    (workdir / "config.json").write_text(to_json(Config()))
    return read_jsonl(workdir / "metrics.jsonl")


def size(png):
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", png[16:24])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"step": 1, "train/loss": 5.0}],
        [{"step": 0, "eval/loss": 5.0}],
        [{"step": 1, "train/loss": None}, {"step": 2, "eval/loss": None}],
        [{"step": s, "train/loss": 1.0, "throughput/tokens_seen": 7.0 * s} for s in range(200)],
    ],
)
def test_picture_has_its_size_whatever_is_there(tmp_path, caplog, rows):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = report.write_loss_png(tmp_path)
    assert path == tmp_path / "loss.png" and size(path.read_bytes()) == (1280, 720)
    assert caplog.records == []  # matplotlib logs what it could not place


def test_picture_shows_the_data():
    falling = [{"step": s, "train/loss": 9.0 - s} for s in range(5)]

    def with_heldout(middle):
        points = ((0, 8.0), (2, middle), (4, 5.0))
        return falling + [{"step": step, "eval/loss": loss} for step, loss in points]

    different = [
        [],
        falling,
        falling[:3],
        [*falling, {"step": 4, "eval/loss": 5.0}],
        with_heldout(6.0),
        with_heldout(7.0),
        [row | {"throughput/tokens_seen": 10.0 * row["step"]} for row in falling],
    ]
    assert plot.draw_loss(falling) == plot.draw_loss(falling)
    assert len({plot.draw_loss(rows) for rows in different}) == len(different)


def resume(rows, at, **facts):
    """Rows of one more session from step `at`."""
    row = make_session_row(read_history(rows), {"learning_rate": 0.5} | facts)
    return [old for old in rows if old["step"] <= at] + [{"step": at} | row]


def test_picture_marks_resumes_and_changed_rates():
    first = resume([], 0)
    first += [{"step": s, "train/loss": 9.0 - s / 10} for s in range(1, 21)]
    assert find_marks(first) == []

    plain = resume(first, 20)
    slower = resume(first, 20, learning_rate=0.25)
    assert find_marks(plain) == [(20, "resumed")]
    assert find_marks(slower) == [(20, "resumed, peak rate 0.5 → 0.25")]
    assert len({plot.draw_loss(rows) for rows in (first, plain, slower)}) == 3


def test_sessions_are_told_apart(tmp_path):
    def train(rows, steps, host):
        """Steps of ten seconds in one more session."""
        start = rows[-1]["step"] - 1 if rows else 0  # the last one was not saved
        before = read_history(rows).wall_seconds
        rows = resume(rows, start, host=host)
        for i in range(1, steps + 1):
            rows.append(
                {"step": start + i, "train/loss": 1.0, "time/wall_seconds": before + 10 * i}
            )
        return rows

    rows = train([], 6, "node1")
    rows = train(rows, 4, "node2")
    rows = train(rows, 2, "node3")

    summary = summarize(rows)
    assert (summary.sessions, summary.wall_seconds) == (3, 120)  # lost work took time too
    assert session_seconds(rows) == [60, 40, 20]
    assert [(s.number, s.step) for s in find_sessions(rows)] == [(1, 0), (2, 5), (3, 8)]
    assert any("2:00  (in 3 sessions)" in line for line in format_summary(summary))

    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    for row in rows:
        writer.write(row["step"], {key: value for key, value in row.items() if key != "step"})
    writer.close()
    path = report.write_report(tmp_path, title="t", summary=summary)
    text = Page(path.read_text("utf-8")).text
    for piece in ("in 3 sessions", "node1", "node2", "node3", "1:00", "0:40", "0:20"):
        assert piece in text, piece


def test_page_says_where_a_run_comes_from(tmp_path):
    facts = {
        "command": "gpt-jax train --config=a.py",
        "preset": "optim.learning_rate = 0.5 (preset: 0.1)",
        "began": "2026-05-01 12:00:03",
        "host": "node1",
        "code": "0.1.0 3f2a9c1",
        "data": "poems.txt, 5,000 tokens",
    }
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write(0, make_session_row(read_history([]), facts))
    writer.close()
    path = report.write_report(tmp_path, title="t", summary=Summary())
    text = Page(path.read_text("utf-8")).text

    assert [value for value in facts.values() if value not in text] == []
    assert "Sessions" not in text  # there is one


def test_page_shows_sources_rates_norms_and_loads(tmp_path):
    assert plot.draw_details([{"step": 1, "train/loss": 1.0}]) is None
    rows = [
        {
            "step": step,
            "train/learning_rate": 0.1 * step,
            "train/grad_norm": 1.0 / step,
            "moe/load_max": 1.5,
            "moe/load_min": 0.5,
            "eval/loss": 3.0,
            "eval/web/loss": 3.25,
            "eval/code.v2/loss": 2.0 + 1 / step,
            "eval/code.v2/bits_per_byte": 1.125,
        }
        for step in (1, 2, 4)
    ]
    sources = {"web": {"loss": 3.25}, "code.v2": {"loss": 2.25, "bits_per_byte": 1.125}}
    assert find_sources(rows) == sources

    drawn = (
        "train/learning_rate",
        "train/grad_norm",
        "moe/load_max",
        "moe/load_min",
        "eval/web/loss",
    )
    pictures = [plot.draw_details(rows)]
    for key in drawn:  # with other values the picture is another one
        pictures.append(plot.draw_details([{**row, key: 0.0} for row in rows]))
    assert len(set(pictures)) == 1 + len(drawn)

    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = report.write_report(tmp_path, title="t", summary=summarize(rows))
    page = Page(path.read_text("utf-8"))
    assert page.tags.count("img") == 2
    for piece in ("by source", "web", "3.2500", "code.v2", "2.2500", "1.1250"):
        assert piece in page.text, piece


def test_prompts_are_set_apart():
    prompts = ("Once", "Once upon", "\n")
    marked = mark_prompt("Once upon <a time>", prompts)
    assert marked == '<mark title="prompt">Once upon</mark> &lt;a time&gt;'
    assert mark_prompt("Twice", prompts) == "Twice"
    assert mark_prompt("\nTwice", prompts) == "\nTwice"  # nobody would see that mark
    text = format_samples([{"step": 1, "text": "Once more"}], prompts)
    assert "<mark" in text and Page(text).text == "Samples over timestep 1\nOnce more"


def test_page_stands_alone_and_holds_everything(tmp_path):
    rows = fill(tmp_path)
    summary = summarize(
        rows,
        parameters=1_234_567,
        xz_bits_per_byte=2.5,
        wall_seconds=3723.0,
        peak="the peak",
        mfu_full=0.5,
        mfu_causal=0.25,
    )
    path = report.write_report(
        tmp_path,
        title="my run",
        summary=summary,
        samples=find_samples(rows),
        versions={"device": "cpu x 1", **library_versions()},
    )
    text = path.read_text("utf-8")
    page = Page(text)
    assert '<meta charset="utf-8">' in text
    assert len(page.links) == 1 and page.links[0].startswith("data:image/png;base64,")
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//|url\(|@import""", text)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)

    for piece in (
        "my run",
        "2.0100",
        "xz -9: 2.5000, the model is 19.6% better",
        "1.2M",
        "1,234,567",
        "5.0k",
        "2.0k",
        "50.0%",
        "25.0%",
        "the peak",
        "1:02:03",
        "1.00%",
        "0.20%",
        "sample at 20",
        "sample at 100",
        "step 75.0%",
        "compile 25.0%",
        "learning_rate",
        "cpu x 1",
        "flax",
    ):
        assert piece in page.text, piece


def test_samples_are_escaped_and_chinese_shows(tmp_path):
    nasty = (
        "<script>alert('x')</script> & \"q\" </pre> 我是一个程序员，我喜欢 \x00\ud800\n  indented"
    )
    path = report.write_report(
        tmp_path,
        title="<i>t</i>",
        summary=Summary(peak="<u>"),
        samples=[{"step": 1, "text": nasty}],
        versions={"<b>": "</td>"},
    )
    page = Page(path.read_text("utf-8"))

    assert not {"script", "i", "u"} & set(page.tags) and "b" in page.tags
    assert nasty.replace("\x00", "\ufffd").replace("\ud800", "\ufffd") in page.text
    assert "<i>t</i>" in page.text and "</td>" in page.text


def test_report_of_an_empty_workdir(tmp_path):
    path = report.write_report(tmp_path / "new", title="t", summary=summarize([]))
    # The title comes twice, and nothing follows.
    assert Page(path.read_text("utf-8")).text.split() == ["tttrained", "with", "gpt_jaxLoss"]


def test_many_samples_are_thinned_but_keep_both_ends(tmp_path):
    samples = [
        {"step": step, "text": f"text{step}."} for step in range(10, 510, 10) for _ in range(2)
    ]
    text = Page(format_samples(samples, shown=5)).text
    assert re.findall(r"step (\d+)", text) == ["10", "130", "250", "370", "500"]
    assert text.count("text500.") == 2 and "5 of 50 times" in text


def test_summary_takes_last_values_median_rates_and_facts_overrule():
    rows = [
        {"step": 1, "eval/loss": 3.0, "throughput/tokens_per_second": 1.0},
        {"step": 2, "eval/loss": None, "throughput/tokens_per_second": 100.0},
        {"step": 3, "throughput/tokens_per_second": 90.0, "time/step": 1.0, "time/eval": 0.0},
    ]
    summary = summarize(rows, steps=7)
    assert math.isnan(summary.eval_loss)
    assert summary.tokens_per_second == 90.0 and summary.steps == 7
    assert summary.phases == {"step": 1.0} and summary.bits_per_byte is None
    with pytest.raises(TypeError):
        summarize(rows, parametres=1)


def test_summary_lines_are_aligned_honest_and_partial():
    summary = Summary(
        bits_per_byte=2.5,
        xz_bits_per_byte=2.0,
        peak="peak unknown for 'X'",
        phases={"data": 0.1, "step": 0.9},
    )
    lines = format_summary(summary, {"checkpoints": "a/b"})

    assert lines == [
        "held-out bits per byte  2.5000  (xz -9: 2.0000, the model is 25.0% WORSE)",
        "MFU                     not reported  (peak unknown for 'X')",
        "time                    step 90.0%, data 10.0%",
        "checkpoints             a/b",
    ]
    assert format_summary(Summary()) == []


def test_smoothing_keeps_lines_straight_and_skips_gaps():
    assert plot.smooth([float(i) for i in range(20)], 4) == pytest.approx(range(20))
    assert plot.smooth([1.0, math.nan, 3.0], 1)[1] == 2.0
    assert math.isnan(plot.smooth([math.nan], 3)[0])


def test_smoothing_does_not_end_on_the_last_value():
    """The end of a noisy curve is an estimate too, near the curve below the noise."""
    noise = [(-1) ** i * 0.5 for i in range(40)]
    falling = [9 - i / 10 for i in range(40)]
    smoothed = plot.smooth([a + b for a, b in zip(falling, noise, strict=True)], 6)
    assert max(abs(a - b) for a, b in zip(smoothed, falling, strict=True)) < 0.25


@pytest.mark.parametrize("count, is_smoothed", [(7, False), (8, True), (59, True), (200, True)])
def test_curves_of_few_points_are_smoothed_too(monkeypatch, count, is_smoothed):
    calls = []
    monkeypatch.setattr(plot, "smooth", lambda values, reach: calls.append(reach) or values)
    plot.draw_loss([{"step": s, "train/loss": float(s % 3)} for s in range(count)])
    assert bool(calls) == is_smoothed
