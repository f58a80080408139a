"""Input, filters or the program change.

They do so between two calls of `gpt-jax prepare`, or during one.
"""

import errno
import importlib
import json
import os
import shutil
import sys

import numpy as np
import pytest
from prepared import contents, documents, prepare, refused, texts, write_jsonl

from gpt_jax.data.prepare import identity, survey, units
from gpt_jax.data.read import documents as readers, sources
from gpt_jax.data.tokens import corpus
from gpt_jax.errors import DataError, UsageError


def test_input_with_its_old_time_and_size_has_changed(folder, monkeypatch):
    path = folder / "in/a.jsonl"
    given = [f"--input={path}"]
    out = prepare(folder / "out", *given)
    old = path.stat()
    path.chmod(0o600)  # the content is the same
    prepare(out, *given)

    path.write_bytes(path.read_bytes().replace(b"cat", b"dog"))
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert path.stat().st_size == old.st_size
    refused(2, ("is finished, and the input has changed", "a.jsonl"), f"--output={out}", *given)

    # Much input is not hashed, and then the stamp alone decides.
    monkeypatch.setattr(identity, "HASHED_BYTES", 0)
    out = prepare(folder / "two", *given)
    prepare(out, *given)
    path.chmod(0o644)
    refused(2, ("the input has changed", "a.jsonl"), f"--output={out}", *given)


def test_inputs_of_an_earlier_version_are_compared_by_what_it_noted(folder):
    path = folder / "in/a.jsonl"
    out = prepare(folder / "out", f"--input={path}")
    facts = path.stat()
    noted = {str(path): [str(facts.st_size), str(facts.st_mtime_ns)]}
    (out / corpus.INPUTS).write_text(json.dumps(noted))
    prepare(out, f"--input={path}")
    os.utime(path)
    refused(2, ("the input has changed",), f"--output={out}", f"--input={path}")


def test_input_that_changes_between_two_calls_is_read_again(folder, monkeypatch):
    given = [f"--input={folder / 'in'}", "--piece_mb=0.002"]
    made = []
    run = units.tokenize

    def stopping(job, unit, tick, **more):
        made.append(unit.name)
        if len(made) == 6:
            raise OSError(errno.EIO, "gone")
        return run(job, unit, tick, **more)

    monkeypatch.setattr(units, "tokenize", stopping)
    refused(2, ("gone",), f"--output={folder / 'out'}", *given)
    write_jsonl(folder / "in/a.jsonl", texts(20, 9))
    prepare(folder / "out", *given)
    assert documents(folder / "out")["text"]["train"] == texts(20, 9) + texts(40, 2)
    assert contents(folder / "out") == contents(prepare(folder / "fresh", *given))


def test_work_of_another_version_of_the_program_is_refused(folder, monkeypatch):
    """A finished folder is not: all of it is of one version."""
    out = folder / "out"
    given = [f"--input={folder / 'in'}", "--piece_mb=0.002"]
    run = units.tokenize
    made = []

    def stopping(job, unit, tick, **more):
        made.append(unit.name)
        if len(made) == 3:
            raise OSError(errno.EIO, "gone")
        return run(job, unit, tick, **more)

    monkeypatch.setattr(units, "tokenize", stopping)
    refused(2, ("gone",), f"--output={out}", *given)
    real = identity.identify_program()
    settings = json.loads((out / "work/settings.json").read_bytes())
    assert settings["program"] == real

    other = {**real, "code": "0123abcd"}
    with monkeypatch.context() as patch:
        patch.setattr(identity, "identify_program", lambda: other)
        words = (f"code was {real['code']} and is 0123abcd", "another version", "remove this one")
        refused(2, words, f"--output={out}", *given)

    prepare(out, *given)
    monkeypatch.setattr(identity, "identify_program", lambda: other)
    prepare(out, *given)


def test_the_version_of_the_program_is_its_code(tmp_path):
    shutil.copytree(identity.DATA, tmp_path / "data")
    before = identity.digest_sources(tmp_path / "data")
    assert before == identity.digest_sources(identity.DATA)
    seen = {before}
    for room in identity.ROOMS:
        with open(sorted((tmp_path / "data" / room).glob("*.py"))[-1], "a") as file:
            file.write("\n")
        seen.add(identity.digest_sources(tmp_path / "data"))
    assert len(seen) == 1 + len(identity.ROOMS)
    with pytest.raises(UsageError, match="code was not noted and is"):
        identity.refuse_other_program(tmp_path, None, identity.identify_program())


@pytest.fixture
def own_filter(folder, monkeypatch):
    """A function that writes the module `mine_of_prepare` anew, as an editor would."""
    monkeypatch.syspath_prepend(folder)
    # Python knows bytecode by seconds and size, and two versions may agree in both.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(body: str) -> None:
        (folder / "mine_of_prepare.py").write_text(f"def change(text):\n    return {body}\n")
        sys.modules.pop("mine_of_prepare", None)
        importlib.invalidate_caches()

    yield write
    sys.modules.pop("mine_of_prepare", None)


def test_a_filter_edited_between_two_calls_is_refused(folder, monkeypatch, own_filter):
    own_filter("text.upper()")
    given = [f"--input={folder / 'in'}", "--piece_mb=0.002", "--filters=mine_of_prepare:change"]
    made = []
    run = units.tokenize

    def stopping(job, unit, tick, **more):
        made.append(unit.name)
        if len(made) == 3:
            raise OSError(errno.EIO, "gone")
        return run(job, unit, tick, **more)

    monkeypatch.setattr(units, "tokenize", stopping)
    refused(2, ("gone",), f"--output={folder / 'out'}", *given)
    own_filter("text.lower()")
    refused(
        2,
        ("the source code of --filters was {'mine_of_prepare:change'", "remove this one"),
        f"--output={folder / 'out'}",
        *given,
    )
    own_filter("text.upper()")
    prepare(folder / "out", *given)
    assert documents(folder / "out")["text"]["train"] == [
        text.upper() for text in texts(60, 1) + texts(40, 2)
    ]
    own_filter("text.lower()")
    refused(2, ("the source code of --filters",), f"--output={folder / 'out'}", *given)


def test_a_filter_edited_while_it_is_in_use_is_refused(folder, monkeypatch, own_filter):
    own_filter("text.upper()")
    run = units.tokenize

    def editing(job, unit, tick, **more):
        own_filter("text.lower()")
        return run(job, unit, tick, **more)

    monkeypatch.setattr(units, "tokenize", editing)
    refused(
        20,
        ("--filters mine_of_prepare:change", "edited while it was in use", "remove --output="),
        f"--output={folder / 'out'}",
        f"--input={folder / 'in'}",
        "--filters=mine_of_prepare:change",
    )


def test_input_that_changes_during_a_call_is_refused(folder, monkeypatch):
    run = units.tokenize

    def changing(job, unit, tick, **more):
        made = run(job, unit, tick, **more)
        (folder / "in/a.jsonl").touch()
        return made

    monkeypatch.setattr(units, "tokenize", changing)
    refused(
        20,
        ("a.jsonl", "changed while being read"),
        f"--output={folder / 'out'}",
        f"--input={folder / 'in'}",
    )
    monkeypatch.undo()
    prepare(folder / "out", f"--input={folder / 'in'}")
    scan = survey.scan

    def rewriting(*given, **named):
        made = scan(*given, **named)
        write_jsonl(folder / "in/a.jsonl", texts(61, 1))
        return made

    monkeypatch.setattr(survey, "scan", rewriting)
    refused(
        20,
        ("a.jsonl", "changed while being read"),
        f"--output={folder / 'two'}",
        f"--input={folder / 'in'}",
        "--dedup=exact",
    )


def test_input_that_is_not_what_was_scanned(folder):
    """If a store cannot tell of a change, the number of documents does."""
    source = sources.Source(folder / "in/a.jsonl", "a.jsonl")
    unit = units.Unit("text", 0, (readers.whole_piece(source),), 1, "")
    job = units.PrepareJob(folder, units.PrepareSettings())
    assert len(list(units.read(job, unit, units.Counts(), np.ones(60, bool)))) == 60
    for count in (59, 61):
        with pytest.raises(DataError, match="changed while being read"):
            list(units.read(job, unit, units.Counts(), np.ones(count, bool)))
