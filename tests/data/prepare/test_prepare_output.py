"""What `gpt-jax prepare` writes. It is the same however it is made."""

import gzip
import json
from pathlib import Path

import fsspec
import pytest
from prepared import contents, documents, prepare, refused, texts, write_jsonl

from gpt_jax import config
from gpt_jax.data.prepare import encoding, own_tokenizer, units
from gpt_jax.data.read import documents as readers, sources
from gpt_jax.data.read.decoding import Reading
from gpt_jax.data.stream import dataset
from gpt_jax.data.tokenizers.bpe import train_bpe
from gpt_jax.data.tokens import corpus, shards


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
    seen = []
    monkeypatch.setattr(
        own_tokenizer,
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
