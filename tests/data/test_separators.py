"""Text files of many documents with a text between them, as TinyStories has them."""

import itertools
import random

import pytest
from packings import pack
from prepared import documents, prepare, refused

from gpt_jax import config
from gpt_jax.data.read import documents as readers, sources, text_rows
from gpt_jax.data.read.decoding import Reading
from gpt_jax.data.read.documents import Tally
from gpt_jax.data.tokenizers.spec import resolve_tokenizer
from gpt_jax.data.tokens import cache, marks
from gpt_jax.errors import UsageError

END = "<|endoftext|>"
STORIES = (
    f"Once there was a cat.\nIt sat.\n{END}\nA dog ran.\n{END}\r\n\n{END}\nThe end. 我{END}我们"
)
TEXTS = ["Once there was a cat.\nIt sat.\n", "A dog ran.\n", "The end. 我", "我们"]


def write(path, text):
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def read(path, size=0, **how):
    """The texts of a file that is cut into pieces of `size` bytes, and what was counted."""
    reading = Reading(**how)
    [source] = sources.find_sources((str(path),))
    pieces = [readers.whole_piece(source)]
    if size:
        pieces = readers.cut_source(source, size, reading)
    tally = Tally()
    return [d.text for d in readers.read_documents(pieces, reading, tally)], tally, pieces


def test_stories_are_documents(tmp_path):
    path = write(tmp_path / "a.txt", "\ufeff" + STORIES)
    texts, tally, _ = read(path, separator=END)
    assert texts == TEXTS
    assert (tally.rows, tally.documents, tally.empty) == (5, 4, 1)

    # Without the option it stays one document, and another text is no separator.
    assert read(path)[0] == [STORIES]
    assert read(path, separator="<|endoftext")[0][1].startswith("|>\nA dog")
    assert read(write(path, "all" + END), separator=END)[0] == ["all"]
    assert read(write(path, ""), separator=END)[0] == []


@pytest.mark.parametrize("separator", [END, "#", "\n\n", "\n---\n", "aa", "##", "\r\n", "a\n"])
@pytest.mark.parametrize("block", [1, 2, 7, 1 << 20])
def test_every_cut_and_every_block_give_the_parts_of_plain_python(
    tmp_path, monkeypatch, separator, block
):
    """Plain Python looks for the separator from the left, and takes the end of line after it."""
    monkeypatch.setattr(text_rows, "BLOCK", block)
    rng = random.Random(1)
    pieces_seen = 0
    for _ in range(25):
        letters = [separator, separator, "a", "\n", "\r\n", "-", "bc", "我", "#", " "]
        text = "".join(rng.choices(letters, k=40))
        wanted = []
        rest = text
        while rest:
            part, found, rest = rest.partition(separator)
            wanted += [part] if part and not part.isspace() else []
            if found and not separator.endswith("\n"):
                rest = rest[2:] if rest[:2] == "\r\n" else rest.removeprefix("\n")

        path = write(tmp_path / "a.txt", text)
        for size in (0, 1, 5, 23):
            texts, _, pieces = read(path, size, separator=separator)
            assert texts == wanted, text
            pieces_seen = max(pieces_seen, len(pieces))
    cuttable = text_rows.can_be_cut(separator.encode())
    assert (pieces_seen > 3) == cuttable
    assert cuttable == (separator in (END, "#", "a\n"))


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_packed_stories(tmp_path, packing):
    path = write(tmp_path / f"a.txt{packing}", pack(STORIES.encode(), packing))
    assert read(path, 3, separator=END)[0] == TEXTS


def test_a_bad_part_is_named_by_its_number_however_the_file_is_cut(tmp_path):
    path = write(tmp_path / "a.txt", f"one{END}two{END}".encode() + b"\xff" + END.encode() + b"4")
    for size in (0, 1, 20):
        with pytest.raises(UsageError, match=r"a.txt:3: not UTF-8 at byte 32 \(0xff\)"):
            read(path, size, separator=END)
        texts, tally, _ = read(path, size, separator=END, on_error="skip")
        assert texts == ["one", "two", "4"] and tally.skipped == 1


def test_other_encodings(tmp_path):
    raw = f"汉字{END}\n狗".encode("gb18030")
    path = write(tmp_path / "a.txt", raw)
    assert read(path, separator=END, encodings=("utf-8", "gb18030"))[0] == ["汉字", "狗"]
    with pytest.raises(UsageError, match="its lines do not end in the byte 0A"):
        read(path, separator=END, encodings=("utf-16-le",))


@pytest.mark.parametrize(
    "how, message",
    [
        ({"documents": "line"}, "separator = '<E>': is for documents = file"),
        ({"encodings": ("utf-8", "utf-16")}, "separator = '<E>': has no bytes that all of"),
    ],
)
def test_separators_that_cannot_be(how, message):
    with pytest.raises(UsageError, match=message):
        Reading(separator="<E>", **how)


def test_a_run_and_a_prepare_cut_alike(tmp_path, capsys):
    path = write(tmp_path / "a.txt", STORIES)
    said = []

    def load(**changes):
        data = config.Data(
            path=(str(path),), cache=str(tmp_path / "cache"), split="document", **changes
        )
        return cache.prepare(data, resolve_tokenizer("bytes"), said.append)

    got = load(separator=END)
    sizes = sorted(len(text.encode()) + 1 for text in TEXTS)
    found = [*got.train.offsets, *(got.train.size + got.eval.offsets[1:])]
    assert sorted(b - a for a, b in itertools.pairwise(found)) == sizes
    assert not [line for line in said if "hold" in line]
    assert load(separator=END).folder == got.folder
    assert load(separator=END, errors="replace").folder != got.folder

    given = (f"--input={path}", "--piece_mb=0.00001")
    folder = prepare(tmp_path / "out", *given, f"--separator={END}")
    assert documents(folder)["text"]["train"] == TEXTS
    assert "the text <|endoftext|>" not in capsys.readouterr().err
    words = ("--separator", "was None and is <|endoftext|>")
    whole = prepare(tmp_path / "whole", *given)
    refused(2, words, f"--output={whole}", *given, f"--separator={END}")


def test_text_that_says_end_of_text_is_told(tmp_path, capsys):
    """It is no end of a document, unless it is named as a separator."""
    path = write(tmp_path / "a.txt", STORIES)
    write(tmp_path / "b.txt", "nothing")
    said = []
    data = config.Data(
        path=(str(path), str(tmp_path / "b.txt")), cache=str(tmp_path / "cache"), eval_fraction=0.3
    )
    cache.prepare(data, resolve_tokenizer("bytes"), said.append)
    line = (
        "1 document holds the text <|endoftext|>, which is encoded as ordinary characters and ends "
        "nothing; --config.data.separator='<|endoftext|>' cuts text files there"
    )
    assert f"data: {line}" in said

    prepare(tmp_path / "out", f"--input={path}", str(tmp_path / "b.txt"))
    assert f"prepare: {line.replace('config.data.', '')}" in capsys.readouterr().err


def test_names_of_end_of_text():
    tokenizer = resolve_tokenizer("bytes")
    assert marks.list_end_names(tokenizer) == (END,)
    names = (END, "</s>")
    assert [marks.find_end_name(text, names) for text in ("a</s>", f"</s>{END}", "b")] == [
        "</s>",
        END,
        "",
    ]
    assert marks.describe_marks({"</s>": 2}, "--separator")[0].startswith("2 documents hold the")
