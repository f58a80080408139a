"""`gpt-jax prepare`: its output, which is the same however it is made, and its refusals."""

import errno
import gzip
import importlib
import io
import json
import os
import shutil
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
import runs
from prepared import contents, documents, prepare, refused, texts, write_jsonl

from gpt_jax import config, files
from gpt_jax.commands.display import Display
from gpt_jax.commands.prepare import sort_inputs
from gpt_jax.data.prepare import assemble, encoding, identity, output, survey, units
from gpt_jax.data.prepare.prepare import Progress
from gpt_jax.data.read import documents as readers, sources
from gpt_jax.data.read.decoding import Reading
from gpt_jax.data.stream import dataset
from gpt_jax.data.tokenizers.bpe import train_bpe
from gpt_jax.data.tokens import corpus, shards
from gpt_jax.errors import DataError, UsageError


@pytest.fixture
def folder(tmp_path):
    """Two files of documents."""
    write_jsonl(tmp_path / "in/a.jsonl", texts(60, 1))
    write_jsonl(tmp_path / "in/b.jsonl", texts(40, 2))
    return tmp_path


def test_documents_come_out_as_they_went_in(folder):
    out = prepare(
        folder / "out", f"--input={folder / 'in'}", "--eval_fraction=0.3", "--piece_mb=0.002"
    )
    wanted = {
        side: [
            t
            for t in texts(60, 1) + texts(40, 2)
            if (shards.hash_text(t) < 0.3 * 2**64) == (side == "eval")
        ]
        for side in ("train", "eval")
    }
    assert documents(out) == {"text": wanted} and len(wanted["eval"]) > 10

    opened = corpus.open_corpus(out)
    for side, tokens in opened.sources["text"].items():
        assert len(tokens.shards) > 2 and tokens.documents == len(wanted[side])
        assert tokens.docs["hash"].tolist() == [shards.hash_text(t) for t in wanted[side]]
        assert tokens.docs["bytes"].tolist() == [len(t.encode()) for t in wanted[side]]
        # A token is a byte, or the end of a text.
        assert tokens.bytes == sum(tokens.docs["bytes"]) == tokens.size - tokens.documents
        names = [
            f"in/{'ab'[int(t[0]) - 1]}.jsonl:{int(t.split()[0][2:]) + 1}" for t in wanted[side]
        ]
        assert [tokens.document_name(i) for i in range(tokens.documents)] == names
    assert not (out / "work").exists()


@pytest.mark.parametrize("more", [(), ("--dedup=exact", "--tokenizer=char")])
def test_the_number_of_workers_changes_no_byte(folder, more):
    given = [
        f"--input=x={folder / 'in/a.jsonl'}",
        f"y={folder / 'in'}",
        "--eval_fraction=0.2",
        "--piece_mb=0.002",
        "--tokenizer=bpe:300",
        *more,
    ]
    one = contents(prepare(folder / "one", *given))
    assert {name.split("/")[0] for name in one} >= {"x", "y", "corpus.json", "tokenizer.json"}

    for workers in (2, 3) if not more else (2,):
        assert contents(prepare(folder / f"w{workers}", *given, workers=workers)) == one


def test_the_size_of_a_unit_changes_shards_and_nothing_else(folder):
    given = [f"--input={folder / 'in'}", "--eval_fraction=0.2"]
    small = prepare(folder / "small", *given, "--piece_mb=0.001")
    large = prepare(folder / "large", *given, "--piece_mb=9")
    assert documents(small) == documents(large)

    a = corpus.open_corpus(small)
    b = corpus.open_corpus(large)
    assert a.content == b.content
    assert len(a.sources["text"]["train"].shards) > len(b.sources["text"]["train"].shards) == 1

    for side in units.SIDES:
        one = a.sources["text"][side]
        other = b.sources["text"][side]
        assert (one.offsets == other.offsets).all() and one.bytes == other.bytes
        assert (one.ids(0, one.size) == other.ids(0, other.size)).all()
        for i in range(one.documents):
            assert one.document_name(i) == other.document_name(i)


def test_content_is_that_of_the_text_and_its_split(folder):
    given = [f"--input={folder / 'in'}", "--eval_fraction=0.2"]
    found = corpus.open_corpus(prepare(folder / "bytes", *given)).content
    assert (
        corpus.open_corpus(prepare(folder / "bpe", *given, "--tokenizer=bpe:300")).content == found
    )
    assert (
        corpus.open_corpus(prepare(folder / "split", *given[:1], "--eval_fraction=0.3")).content
        != found
    )
    (folder / "in/a.jsonl").rename(folder / "in/aa.jsonl")
    assert corpus.open_corpus(prepare(folder / "renamed", *given)).content == found


def test_long_documents_are_encoded_in_parts(folder, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 50)
    long = " ".join(texts(3000, 3))
    write_jsonl(folder / "in/a.jsonl", [long, "short", long[::-1]])
    out = prepare(folder / "out", f"--input={folder / 'in/a.jsonl'}", "--tokenizer=bpe:400")
    assert documents(out)["text"]["train"] == [long, "short", long[::-1]]
    opened = corpus.open_corpus(out)
    tokens = opened.sources["text"]["train"]
    assert (
        tokens.ids(0, int(tokens.offsets[1]) - 1).tolist() == opened.tokenizer.encode(long).tolist()
    )


def test_bpe_sees_the_training_side_of_what_stays(folder):
    held = [t for t in texts(4000, 5) if shards.hash_text(t) < 0.01 * 2**64]
    rows = texts(60, 1) + ["zqzqzqzq " * 50] * 3 + held
    write_jsonl(folder / "in/a.jsonl", rows)
    out = prepare(
        folder / "out",
        f"--input={folder / 'in/a.jsonl'}",
        "--tokenizer=bpe:290",
        "--dedup=exact",
        "--eval_fraction=0.01",
    )
    alone = train_bpe([t for t in dict.fromkeys(rows) if shards.hash_text(t) >= 0.01 * 2**64], 290)

    assert corpus.open_corpus(out).tokenizer.fingerprint == alone.fingerprint


def test_a_sample_for_the_tokenizer_is_spread_over_the_input(folder, monkeypatch):
    from gpt_jax.data.prepare import prepare as module

    seen = []
    monkeypatch.setattr(
        module,
        "make_tokenizer",
        lambda spec, texts, characters: train_bpe(seen.extend(texts()) or list(seen), 280),
    )
    write_jsonl(folder / "in/c.jsonl", texts(60, 99))
    write_jsonl(folder / "in/d.jsonl", ["100." + "long " * 4000])  # cut at its share
    prepare(
        folder / "out",
        f"--input={folder / 'in'}",
        "--tokenizer=bpe:280",
        "--tokenizer_mb=0.004",
        "--piece_mb=0.01",
    )
    # The sample has the beginning of every file.
    assert {text.split(".")[0] for text in seen} == {
        "1",
        "2",
        "99",
        "100",
    }
    assert 3000 < sum(len(text.encode()) for text in seen) < 5000


def test_exact_copies_are_left_out_wherever_they_are(folder):
    write_jsonl(folder / "in/b.jsonl", [texts(1, 1)[0], "new", *texts(60, 1)[30:], "new"])
    given = [f"--input=a={folder / 'in/a.jsonl'}", f"b={folder / 'in/b.jsonl'}", "--piece_mb=0.002"]
    out = prepare(folder / "out", *given, "--dedup=exact")
    assert documents(out) == {
        "a": {"train": texts(60, 1), "eval": []},
        "b": {"train": ["new"], "eval": []},
    }
    manifest = corpus.read_manifest(out)
    assert manifest["counts"]["exact"] == 32 and manifest["counts"]["near"] == 0
    assert corpus.open_corpus(out).sources["b"]["train"].document_name(0) == "b.jsonl:2"
    assert len(documents(prepare(folder / "all", *given))["b"]["train"]) == 33


def test_near_copies_are_left_out(folder):
    pytest.importorskip("datasketch", reason="the extra dedup is not installed")
    words = [f"word{i}" for i in range(400)]
    near = [*words[:200], "changed", *words[201:]]
    other = [f"other{i}" for i in range(400)]
    write_jsonl(
        folder / "in/a.jsonl", [" ".join(words), " ".join(other), " ".join(words), " ".join(near)]
    )
    out = prepare(
        folder / "out", f"--input={folder / 'in/a.jsonl'}", "--dedup=near:0.7", "--piece_mb=0.001"
    )
    assert documents(out)["text"]["train"] == [" ".join(words), " ".join(other)]

    counts = corpus.read_manifest(out)["counts"]
    assert (counts["exact"], counts["near"]) == (1, 1)


def test_filters_apply_in_order_and_are_counted(folder):
    write_jsonl(folder / "in/a.jsonl", ["  long enough  ", "short", "   ", "another long one"])
    given = [f"--input={folder / 'in/a.jsonl'}", "--filters", "strip", "min_chars:8"]
    for more in ((), ("--dedup=exact",)):
        out = prepare(folder / f"out{len(more)}", *given, *more)
        assert documents(out)["text"]["train"] == ["long enough", "another long one"]
        counts = corpus.read_manifest(out)["counts"]
        assert sum(counts["filtered"].values()) == 2 and counts["documents"] == 4


def test_rows_that_cannot_be_read(folder):
    path = folder / "in/a.jsonl"
    path.write_text('{"text": "one"}\n{"text": \n\n{"other": "x"}\n{"text": ""}\n{"text": "two"}\n')
    given = [f"--input={path}"]
    for workers in (1, 2):  # the reason crosses from a worker
        more = f"--input={folder / 'in/b.jsonl'}", f"--workers={workers}", "--piece_mb=0.0001"
        refused(2, ("a.jsonl:2", "JSON"), f"--output={folder / 'out'}{workers}", *given, *more)
    out = prepare(folder / "skip", *given, "--on_error=skip", "--piece_mb=0.00001")
    assert documents(out)["text"]["train"] == ["one", "two"]

    counts = corpus.read_manifest(out)["counts"]
    assert counts["skipped"] == 2 and counts["empty"] == 2 and "a.jsonl:2" in counts["places"][0]

    opened = corpus.open_corpus(out).sources["text"]["train"]
    assert [opened.document_name(i) for i in range(2)] == ["a.jsonl:1", "a.jsonl:6"]
    refused(
        2, ("a.jsonl:1", "'body'", "text"), f"--output={folder / 'field'}", *given, "--field=body"
    )


@pytest.mark.parametrize("tokenizer", ["bytes", "char", "bpe:280", "bpe:280:cl100k"])
def test_a_nul_spelt_out_in_json_is_a_character_like_any_other(folder, tokenizer):
    """It is text on purpose, unlike the byte in a text file. The filter `controls` takes it out."""
    rows = ["before \0 after", "\0", "a\0\0b\x01c", "plain"]
    given = [
        f"--input={write_jsonl(folder / 'nul.jsonl', rows)}",
        f"--tokenizer={tokenizer}",
        "--dedup=exact",
    ]
    assert "\\u0000" in (folder / "nul.jsonl").read_text()

    one = prepare(folder / "one", *given)
    two = prepare(folder / "two", *given, workers=2)
    assert documents(one)["text"]["train"] == rows and contents(one) == contents(two)

    none = documents(prepare(folder / "none", *given, "--filters=controls"))["text"]["train"]
    assert none == ["before  after", "abc", "plain"]

    data = config.Data(
        path=(str(folder / "nul.jsonl"),),
        tokenizer=tokenizer,
        eval_fraction=0.0,
        field="text",
        cache=str(folder / "cache"),
    )
    found = dataset.load_dataset(data, lambda line: None)
    assert found.tokenizer.decode(
        found.parts[0].train.ids(0, found.parts[0].train.size)
    ) == "".join(rows)


def test_many_small_files_share_a_unit_and_packed_ones_are_read(folder):
    small = folder / "small"
    small.mkdir()
    for i in range(9):
        (small / f"{i}.txt").write_text(f"text {i}")
    with gzip.open(small / "x.jsonl.gz", "wt") as file:
        file.write('{"text": "packed 1"}\n{"text": "packed 2"}\n')
    out = prepare(folder / "out", f"--input={small}", "--piece_mb=1")
    tokens = corpus.open_corpus(out).sources["text"]["train"]

    assert documents(out)["text"]["train"] == [f"text {i}" for i in range(9)] + [
        "packed 1",
        "packed 2",
    ]
    assert len(tokens.shards) == 1
    assert [tokens.document_name(i) for i in (0, 8, 9, 10)] == [
        "small/0.txt",
        "small/8.txt",
        "small/x.jsonl.gz:1",
        "small/x.jsonl.gz:2",
    ]


def write_rows(path: Path, rows: list[str]) -> None:
    """Writes the rows in the format that the name asks for."""
    import pyarrow
    import pyarrow.csv
    import pyarrow.ipc
    import pyarrow.parquet

    table = pyarrow.table({"number": list(range(len(rows))), "text": rows})
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=4)
    elif path.suffix == ".arrow":
        with (
            pyarrow.OSFile(str(path), "wb") as file,
            pyarrow.ipc.new_file(file, table.schema) as out,
        ):
            out.write_table(table, max_chunksize=4)
    elif path.suffix == ".csv":
        pyarrow.csv.write_csv(table, path)
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"text": row} for row in rows]))
    else:
        path.write_text("".join(row + "\n\n" for row in rows))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.csv", "a.json", "a.txt"])
def test_documents_of_every_format_keep_their_names(name, tmp_path):
    """However the file is cut, a corpus names a document as the reader does."""
    rows = texts(30)
    path = tmp_path / name
    write_rows(path, rows)
    out = prepare(tmp_path / "out", f"--input={path}", "--piece_mb=0.0004", "--documents=line")
    tokens = corpus.open_corpus(out).sources["text"]["train"]
    assert documents(out)["text"]["train"] == rows
    whole = readers.read_documents(
        (readers.whole_piece(sources.Source(path, name)),), Reading(documents="line")
    )
    assert [tokens.document_name(i) for i in range(30)] == [document.name for document in whole]
    assert (len(tokens.shards) > 2) == (name in ("a.parquet", "a.txt"))  # those that can be cut


def test_input_on_a_store(tmp_path):
    store = fsspec.filesystem("memory")
    given = ["--input=memory://in/*.jsonl", "--piece_mb=0.001"]
    for name, some in (("a", texts(30, 1)), ("b", texts(20, 2))):
        store.pipe(
            f"/in/{name}.jsonl",
            "".join(json.dumps({"text": text}) + "\n" for text in some).encode(),
        )
    out = prepare(tmp_path / "out", *given)
    assert documents(out)["text"]["train"] == texts(30, 1) + texts(20, 2)

    prepare(out, *given)
    store.pipe("/in/a.jsonl", store.cat("/in/a.jsonl").replace(b"cat", b"dog"))  # as long as before
    refused(2, ("the input has changed", "a.jsonl"), f"--output={out}", *given)


# ---- again, and with other things in the way ----


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


BAD = {
    "nothing": ([], ["--input and --output"]),
    "no output": (["--input=x"], ["--input and --output"]),
    "no such input": (
        ["--input=nosuch.jsonl", "--output=out"],
        ["--input text", "nosuch.jsonl", "no such file"],
    ),
    "a store to write to": (
        ["--input=x", "--output=gs://b/c"],
        ["--output=gs://b/c", "local folder"],
    ),
    "unknown engine": (
        ["--input=x", "--output=out", "--engine=spark"],
        ["--engine=spark", "local, ray"],
    ),
    "all held out": (
        ["--input=x", "--output=out", "--eval_fraction=1"],
        ["--eval_fraction=1", "0.9"],
    ),
    "not a number": (["--input=x", "--output=out", "--piece_mb=nan"], ["--piece_mb=nan"]),
    "fewer than no workers": (["--input=x", "--output=out", "--workers=-1"], ["--workers=-1"]),
    "name of our own folder": (["--input=work=x", "--output=out"], ["'work'", "name of a source"]),
    "dedup": (
        ["--input=README.md", "--output=out", "--dedup=fuzzy"],
        ["--dedup=fuzzy", "near:SIMILARITY"],
    ),
    "similarity": (
        ["--input=README.md", "--output=out", "--dedup=near:7"],
        ["--dedup=near:7", "between 0 and 1"],
    ),
    "errors": (
        ["--input=x", "--output=out", "--errors=ignore"],
        ["--errors='ignore'", "strict, replace"],
    ),
    "encoding": (
        ["--input=x", "--output=out", "--encodings", "klingon"],
        ["--encodings='klingon'", "gb18030"],
    ),
    "on_error": (
        ["--input=x", "--output=out", "--on_error=bogus"],
        ["--on_error='bogus'", "stop, skip"],
    ),
    "documents": (
        ["--input=x", "--output=out", "--documents=page"],
        ["--documents='page'", "file, line"],
    ),
    "name that cannot be": (
        ["--input=my source=x", "--output=out"],
        ["'my source'", "name of a source", "letters"],
    ),
    "filter": (
        ["--input=README.md", "--output=out", "--filters=shorten"],
        ["--filters='shorten'", "min_chars:N"],
    ),
    "tokenizer": (
        ["--input=README.md", "--output=out", "--tokenizer=bpe:2"],
        ["--tokenizer", "bpe:2"],
    ),
    "two tasks": (["--inspect=a", "--verify=b"], ["--inspect=a", "alone"]),
    "unknown flag": (["--inputs=a"], ["--inputs", "--help"]),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text("some text")
    given, words = BAD[case]
    refused(2, words, *given)
    assert not Path("out").exists()


def test_folders_of_no_use(folder):
    given = f"--input={folder / 'in'}"
    refused(2, ("is not empty", "in"), given, f"--output={folder / 'in'}")
    (folder / "file").write_text("x")
    refused(2, ("is a file",), given, f"--output={folder / 'file'}")
    write_jsonl(folder / "empty.jsonl", ["", ""])
    refused(
        2,
        ("no text is left", "2 empty"),
        f"--input={folder / 'empty.jsonl'}",
        f"--output={folder / 'out'}",
    )


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


def test_filters_given_apart_add_up_and_output_inside_input_is_refused(tmp_path):
    write_jsonl(tmp_path / "in" / "a.jsonl", texts(30))
    given = f"--input={tmp_path / 'in'}"
    both = documents(
        prepare(tmp_path / "both", given, "--filters", "min_chars:100", "--filters=strip")
    )
    assert both["text"]["train"] == [text for text in texts(30) if len(text) >= 100]
    refused(2, ("--output=", "lies inside --input="), given, f"--output={tmp_path / 'in' / 'out'}")
    with pytest.raises(Exception, match="cannot be the name of a source"):
        prepare(tmp_path / "out", f"--input=corpus.json={tmp_path / 'in'}")


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


def test_a_path_that_looks_like_a_named_one_is_the_path_or_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("date=2024").mkdir()
    assert sort_inputs(["date=2024", "x=date=2024"]) == {
        "text": ("date=2024",),
        "x": ("date=2024",),
    }
    Path("2024").mkdir()
    with pytest.raises(UsageError, match=r"date=2024: both .* write ./date=2024 .* date=./2024"):
        sort_inputs(["date=2024"])
    wanted = {"text": ("./date=2024",), "date": ("./2024",)}
    assert sort_inputs(["./date=2024", "date=./2024"]) == wanted


def test_files_that_are_given_twice_are_named(tmp_path, capsys, monkeypatch):
    """They are named in one line, whatever their paths look like."""
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", texts(3, ord(name))) for name in "ab"]
    monkeypatch.chdir(tmp_path)
    runs.call(
        "prepare",
        f"--input=wiki={paths[0]}",
        f"--input=wiki={paths[1]}",
        "--input",
        "a.jsonl",
        "b.jsonl",
        "--workers=1",
        f"--output={tmp_path / 'out'}",
    )
    said = (
        f"--input: {paths[0]} is given 2 times, and 1 more file: their documents are taken as often"
    )

    assert said in capsys.readouterr().err
    assert corpus.read_manifest(tmp_path / "out")["sources"].keys() == {"wiki", "text"}


@pytest.mark.parametrize("saved", [{"revisions": 5}, {"program": [1]}])
def test_settings_of_another_shape_are_damage(tmp_path, saved):
    work = tmp_path / "work"
    work.mkdir()
    (work / "settings.json").write_text(json.dumps(saved))
    (work / "unit-00000.json").write_text("{}")
    assert identity.read_settings(tmp_path) == {}
    with pytest.raises(UsageError, match=r"settings\.json there is damaged"):
        output.begin(tmp_path, saved, print)
