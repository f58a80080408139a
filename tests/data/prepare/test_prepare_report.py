"""What `gpt-jax prepare` says while it works and at its end."""

import io
import json

import pytest
import runs
from prepared import prepare, texts, write_jsonl

from gpt_jax.commands.display import Display
from gpt_jax.data.prepare.prepare import Progress
from gpt_jax.data.tokens import corpus


def test_a_finished_run_prints_what_it_made(folder, capsys):
    prepare(
        folder / "out",
        f"--input=a={folder / 'in/a.jsonl'}",
        f"b={folder / 'in/b.jsonl'}",
        "--eval_fraction=0.00001",
    )
    out, err = capsys.readouterr()
    assert "100 documents with text" in out and "all" in out and "nothing is held out" in err
    json.loads((folder / "out/corpus.json").read_text())


def test_a_reader_that_has_gone_does_not_end_the_work(folder, monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr("sys.stderr", Gone())
    # The output says that a tokenizer is made.
    out = prepare(folder / "out", f"--input={folder / 'in'}", "--tokenizer=bpe:280")
    assert corpus.is_corpus(out)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_progress_is_a_bar_or_lines(stream, monkeypatch):
    err = stream()
    monkeypatch.setattr("sys.stderr", err)
    monkeypatch.setattr("gpt_jax.commands.display.LINE_SECONDS", 0.0)
    monkeypatch.setattr("gpt_jax.commands.display.BAR_SECONDS", 0.0)
    display = Display()
    for done in (0, 25_000_000, 50_000_000):
        display.show(Progress("tokens", done, 100_000_000, done // 1000, 2 * done))
    display.say("a line")
    display.show(Progress("other", 0, 10, 0, 0))
    display.close()
    shown = err.getvalue()
    for wanted in ("tokens", "documents/s", "MB/s of text", "prepare: a line", "other"):
        assert wanted in shown

    assert ("50%" in shown) == (stream is Terminal) and ("s left" in shown) == (
        stream is io.StringIO
    )


def test_inputs_that_are_joined_and_files_that_are_no_part_are_told(tmp_path, capsys):
    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl", texts(5, ord(name)))
    folder = prepare(
        tmp_path / "out", "--input", f"wiki={tmp_path}/a.jsonl", f"wiki={tmp_path}/b.jsonl"
    )
    assert (
        f"source wiki is given 2 times and joins {tmp_path}/a.jsonl, {tmp_path}/b.jsonl"
        in capsys.readouterr().err
    )

    (folder / "wiki/notes.txt").write_text("mine")
    runs.call("prepare", f"--verify={folder}")
    said = capsys.readouterr()
    assert "all files are whole" in said.out
    assert (
        said.err.count("is no part of the corpus") == 1 and "wiki/notes.txt: is no part" in said.err
    )


def test_a_source_of_which_nothing_is_held_out_is_named(tmp_path, capsys):
    for name, count in (("one", 1), ("many", 60)):
        write_jsonl(tmp_path / f"{name}.jsonl", texts(count, count))
    inputs = [f"--input={name}={tmp_path / name}.jsonl" for name in ("one", "many")]

    for part, said in (("0.1", True), ("0", False)):
        runs.call(
            "prepare",
            *inputs,
            f"--eval_fraction={part}",
            "--workers=1",
            f"--output={tmp_path / part}",
        )
        out = capsys.readouterr().out
        assert (
            "one: none of its 1 documents was held out (--eval_fraction=0.1" in out
        ) == said and "many: none" not in out
