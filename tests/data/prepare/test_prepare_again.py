"""`gpt-jax prepare` is called again.

A disk was full, another call works beside it, or all was done before.
"""

import errno
import json
import os

import pytest
import runs
from prepared import contents, documents, prepare, refused, texts, write_jsonl

from gpt_jax import files
from gpt_jax.data.prepare import assemble, units
from gpt_jax.data.read import documents as readers
from gpt_jax.data.tokens import corpus
from gpt_jax.errors import UsageError


def test_a_full_disk_at_every_write_in_turn(folder, monkeypatch):
    """Each call has room for one more write than the one before.

    The last output is that of an undisturbed call.
    """
    given = [
        f"--input={folder / 'in'}",
        "--eval_fraction=0.2",
        "--piece_mb=0.006",
        "--tokenizer=bpe:300",
        "--dedup=exact",
    ]
    wanted = contents(prepare(folder / "wanted", *given))
    sync = files.sync_file
    room = [0]

    def full(file):
        if not room[0]:
            file.flush()
            file.truncate(max(0, os.fstat(file.fileno()).st_size - 1))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room[0] -= 1
        sync(file)

    monkeypatch.setattr(files, "sync_file", full)
    for calls in range(100):
        room[0] = calls
        code = 0
        line = ""
        try:
            prepare(folder / "out", *given)
            break
        except UsageError as error:
            code = error.code
            line = str(error)
        assert code == 2 and f"--output={folder / 'out'}" in line and "No space left" in line, line
        assert not corpus.is_corpus(folder / "out")
        left = list((folder / "out").rglob(".*"))
        assert left == []  # nothing that takes room
    assert calls > 5 and contents(folder / "out") == wanted


def test_a_marker_of_an_older_version_is_gone_on_with(folder):
    job = units.PrepareJob(folder, units.PrepareSettings())
    unit = units.Unit("text", 0, (), 0, "key")
    (folder / units.WORK).mkdir()
    made = units.write_marker(job, "tokens", unit, {}, units.Counts(readers.Tally(rows=3)))
    made["tally"]["bytes"] = 99  # counted once
    units.locate_marker(job, "tokens", unit).write_text(json.dumps(made))
    assert readers.Tally(**units.read_marker(job, "tokens", unit)["tally"]) == readers.Tally(rows=3)


def test_the_same_call_again_does_nothing_and_another_is_refused(folder, capsys):
    given = [f"--input=a={folder / 'in/a.jsonl'}", "--eval_fraction=0.2"]
    out = prepare(folder / "out", *given)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    prepare(out, *given)
    said = capsys.readouterr().err
    assert "is finished already" in said
    assert f"`gpt-jax prepare --verify={out}` checks the content." in said
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before

    there = f"--output={out}"
    refused(2, ("--eval_fraction was 0.2 and is 0.3",), there, given[0], "--eval_fraction=0.3")
    refused(2, ("--tokenizer was bytes", "bpe:300"), there, *given, "--tokenizer=bpe:300")
    refused(
        2,
        ("--input was ['a'] and is ['text']",),
        there,
        f"--input={folder / 'in/a.jsonl'}",
        given[1],
    )
    refused(2, ("--field was text and is body",), there, *given, "--field=body")

    (folder / "in/a.jsonl").write_text('{"text": "new"}\n')
    refused(2, ("is finished, and the input has changed", "a.jsonl"), there, *given)
    refused(2, ("b.jsonl",), there, *given, f"a={folder / 'in/b.jsonl'}")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_finished_folder_is_looked_at_again(folder, capsys):
    """A file that was cut is seen at once by its size.

    A flipped byte is seen by --verify, as the line and the help say.
    """
    given = [f"--input={folder / 'in'}"]
    out = prepare(folder / "out", *given)
    shard = out / "text/train-00000.tokens"
    raw = shard.read_bytes()
    shard.write_bytes(raw[:-4])
    capsys.readouterr()
    refused(20, ("train-00000.tokens: has", "--verify"), f"--output={out}", *given)
    assert "is finished" not in capsys.readouterr().err

    shard.write_bytes(raw[:50] + b"?" + raw[51:])
    prepare(out, *given)
    assert f"--verify={out}" in capsys.readouterr().err
    refused(20, ("train-00000.tokens",), f"--verify={out}")
    with pytest.raises(SystemExit):
        runs.call("prepare", "--help")
    assert "--verify checks their content" in " ".join(capsys.readouterr().out.split())


def test_what_is_left_of_a_finished_call_is_removed_under_the_lock(folder, monkeypatch):
    given = [f"--input={folder / 'in'}"]
    out = prepare(folder / "out", *given)
    clean = assemble.clean
    calls = []
    (out / f".{'0' * 32}").touch()

    def cleaning(*where):
        calls.append(where)
        if len(calls) == 1:
            refused(2, ("another gpt-jax prepare is at work there",), f"--output={out}", *given)
        clean(*where)

    monkeypatch.setattr(assemble, "clean", cleaning)
    wanted = {name: content for name, content in contents(out).items() if not name.startswith(".")}
    prepare(out, *given)
    assert contents(out) == wanted and len(calls) == 1
    prepare(out, *given)
    assert len(calls) == 1  # nothing to remove, and nothing need be writable


def test_two_calls_at_once(folder, monkeypatch):
    run = units.tokenize

    settings = folder / "out" / "work" / "settings.json"

    def meanwhile(job, unit, tick, **more):
        before = settings.read_bytes()
        for other in ((), ("--tokenizer=char",)):
            refused(
                2,
                ("another gpt-jax prepare is at work",),
                f"--output={folder / 'out'}",
                f"--input={folder / 'in'}",
                *other,
            )
        assert settings.read_bytes() == before
        return run(job, unit, tick, **more)

    monkeypatch.setattr(units, "tokenize", meanwhile)
    prepare(folder / "out", f"--input={folder / 'in'}")
    assert corpus.is_corpus(folder / "out")


def test_an_output_that_is_a_link_to_nothing(folder):
    (folder / "out").symlink_to("nowhere")
    refused(
        2,
        (f"--output={folder / 'out'}: is a link to nowhere", "remove the link"),
        f"--output={folder / 'out'}",
        f"--input={folder / 'in'}",
    )


def test_another_spelling_of_the_same_input_goes_on(folder, monkeypatch, capsys):
    """The path is given from another folder.

    The call resumes the one before it, and a finished output is taken for the same.
    """
    out = folder / "out"
    run = units.tokenize
    begun = []

    def stops_after_one(job, unit, tick, **more):
        if begun:
            raise UsageError("enough")
        begun.append(unit)
        return run(job, unit, tick, **more)

    write_jsonl(folder / "long/a.jsonl", texts(400))
    cut = "--piece_mb=0.01"
    monkeypatch.setattr(units, "tokenize", stops_after_one)
    refused(2, ("enough",), f"--output={out}", f"--input=s={folder / 'long'}", cut)
    (done,) = out.glob("s/*.tokens")
    written = done.stat().st_mtime_ns
    monkeypatch.setattr(units, "tokenize", run)
    monkeypatch.chdir(folder)
    prepare(out, "--input=s=long", cut)
    assert done.stat().st_mtime_ns == written and len(list(out.glob("s/*.tokens"))) > 1
    prepare(out, f"--input=s={folder}/in/../long", cut)
    assert "is finished already" in capsys.readouterr().err


def test_a_first_call_that_failed_before_any_unit_spoils_nothing(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", texts(5))
    refused(
        2,
        ("txet",),
        f"--input={tmp_path / 'a.jsonl'}",
        "--field=txet",
        f"--output={tmp_path / 'out'}",
    )
    assert documents(prepare(tmp_path / "out", f"--input={tmp_path / 'a.jsonl'}"))["text"][
        "train"
    ] == texts(5)
