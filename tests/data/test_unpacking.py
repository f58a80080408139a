"""Packed files that unpack to more than text does, and .zst files with long windows."""

import json
import lzma
import shutil
import subprocess
import sys
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
from packings import pack
from prepared import documents, prepare, refused, write_jsonl

from gpt_jax.data.read import documents as readers, sources, unpacking
from gpt_jax.data.read.decoding import Reading
from gpt_jax.data.read.documents import Tally
from gpt_jax.data.read.unpacking import _find_window
from gpt_jax.errors import UsageError

SIZE = 10_000_000
LIMIT = 1 << 20
GOOD = b'{"text": "good"}\n'
FINE = b'{"text": "fine"}\n'


@pytest.fixture
def limit(monkeypatch):
    """A limit that tests reach in little time."""
    monkeypatch.setattr(unpacking, "LARGEST_ROW", LIMIT)
    monkeypatch.setattr(unpacking, "LARGEST_RATIO", 2)


def read(path, **how):
    """(the texts of a file, what was left out)."""
    tally = Tally()
    pieces = map(readers.whole_piece, sources.find_sources((str(path),)))
    found = readers.read_documents(pieces, Reading(**how), tally)
    return [document.text for document in found], tally


ZEROS = b"0" * SIZE
BOMBS = {  # name: (content, a reading, what is left when it is skipped)
    "a.jsonl": (GOOD + ZEROS + b"\n" + FINE, {}, ["good", "fine"]),
    "a.tsv": (b"text\ngood\n" + ZEROS + b"\nfine\n", {}, ["good", "fine"]),
    "lines.txt": (b"good\n" + ZEROS + b"\nfine\n", {"documents": "line"}, ["good\n", "fine\n"]),
    "parts.txt": (b"good<E>" + ZEROS + b"<E>fine", {"separator": "<E>"}, ["good", "fine"]),
    "end.txt": (b"good#" + ZEROS, {"separator": "#"}, ["good"]),
    "a.txt": (ZEROS, {}, []),
    "a.json": (b'[{"text": "' + ZEROS + b'"}]', {}, []),
    "b.json": (b'{"text":\n"' + ZEROS + b'"}', {}, []),
    # What comes after a broken row of .csv may belong to it.
    "a.csv": (b"text\ngood\n" + ZEROS + b"\nfine\n", {}, ["good"]),
    "cell.csv": (b'text\ngood\n"' + b"0\n" * (SIZE // 2) + b'"\nfine\n', {}, ["good"]),
}


@pytest.mark.parametrize("packing", [".gz", ".xz", ".zst", ".bz2"])
@pytest.mark.parametrize("name", BOMBS)
def test_a_row_that_unpacks_to_too_much_is_bad_data(tmp_path, limit, name, packing):
    content, how, left = BOMBS[name]
    (tmp_path / f"{name}{packing}").write_bytes(pack(content, packing))
    with pytest.raises(UsageError, match="unpacks to more than 1,048,576 bytes") as stopped:
        read(tmp_path / f"{name}{packing}", **how)
    assert "--on_error=skip" in str(stopped.value)

    texts, tally = read(tmp_path / f"{name}{packing}", on_error="skip", **how)
    assert [text.strip() for text in texts] == [text.strip() for text in left]
    assert tally.skipped == 1 and "unpacks to more than" in tally.places[0]
    assert name in tally.places[0]


@pytest.mark.parametrize("name", ["a.jsonl", "lines.txt", "parts.txt", "a.txt", "cell.csv"])
def test_memory_is_about_the_limit(tmp_path, limit, name):
    content, how, _ = BOMBS[name]
    (tmp_path / f"{name}.gz").write_bytes(pack(content, ".gz"))
    tracemalloc.start()
    read(tmp_path / f"{name}.gz", on_error="skip", **how)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * LIMIT < SIZE


def test_rows_of_files_that_are_not_packed_may_be_as_long_as_the_file(tmp_path, limit):
    long = "0" * (3 * LIMIT)
    for name in ("a.txt", "a.jsonl"):
        text = long if name == "a.txt" else json.dumps({"text": long})
        (tmp_path / name).write_text(text)
        assert read(tmp_path / name)[0] == [long]


def test_a_packed_table_is_not_unpacked_to_more_than_the_limit(tmp_path, limit):
    """It goes into a temporary file, which could fill the disk."""
    (tmp_path / "a.parquet.gz").write_bytes(pack(ZEROS, ".gz"))
    with pytest.raises(UsageError, match=r"a.parquet.gz: unpacks to more than 1,048,576 bytes"):
        read(tmp_path / "a.parquet.gz")


def test_a_column_that_unpacks_to_too_much_is_bad_data(tmp_path, limit):
    table = pyarrow.table({"text": ["good", "0" * SIZE]})
    pyarrow.parquet.write_table(
        table, tmp_path / "a.parquet", compression="zstd", use_dictionary=False
    )
    with pytest.raises(UsageError, match=r"a.parquet: .*row group 0 unpacks to 10,000,0"):
        read(tmp_path / "a.parquet")
    texts, tally = read(tmp_path / "a.parquet", on_error="skip")
    assert (texts, tally.skipped) == ([], 1)


def test_prepare_skips_a_row_that_unpacks_to_too_much(tmp_path):
    """With the limits that the program has."""
    rows = [GOOD, b'{"text": "', b"0" * (unpacking.LARGEST_ROW + 1), b'"}\n', FINE]
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(b"".join(rows), preset=0))
    given = (f"--input={tmp_path / 'a.jsonl.xz'}", f"--output={tmp_path / 'stopped'}")
    refused(2, ("a.jsonl.xz:2: unpacks to more than 67,108,864 bytes", "--on_error=skip"), *given)

    folder = prepare(tmp_path / "out", given[0], "--on_error=skip")
    assert documents(folder)["text"]["train"] == ["good", "fine"]


def test_a_lack_of_memory_while_reading_is_no_matter_of_the_model(tmp_path, monkeypatch):
    """Neither is it damage that --on_error=skip would leave out."""

    def fail(*given, **more):
        raise MemoryError

    source = write_jsonl(tmp_path / "a.jsonl", ["one"])
    monkeypatch.setattr(readers, "decode", fail)
    with pytest.raises(UsageError, match=r"a.jsonl: memory ran out while it was read; cut text"):
        read(source, on_error="skip")

    pyarrow.parquet.write_table(pyarrow.table({"text": ["one"]}), tmp_path / "a.parquet")

    def fail_arrow(*given, **more):
        raise pyarrow.lib.ArrowMemoryError("realloc of size 1")

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", fail_arrow)
    with pytest.raises(UsageError, match=r"a.parquet: memory ran out"):
        read(tmp_path / "a.parquet", on_error="skip")


# ---- long windows ----


def frame(window: int, single: bool = False) -> bytes:
    """The header of a frame that looks back so far, as RFC 8878 has it."""
    if single:
        return b"\x28\xb5\x2f\xfd" + bytes([0b1110_0000]) + window.to_bytes(8, "little")
    exponent = window.bit_length() - 11
    return b"\x28\xb5\x2f\xfd" + bytes([0, exponent << 3]) + bytes(9)


def test_windows_are_found_in_headers():
    for size in (1 << 10, 1 << 27, 1 << 28, 1 << 31):
        for single in (True, False):
            assert _find_window(frame(size, single)) == size
            skipped = b"\x53\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"abc"
            assert _find_window(skipped + skipped + frame(size, single)) == size
    for content in (b"", b"a", GOOD, b"\x28\xb5\x2f\xfd", b"\x53\x2a\x4d\x18\xff\0\0\0"):
        assert _find_window(content) == 0
    assert _find_window(b"\x28\xb5\x2f\xfd" + bytes([0b0110_0000, 3, 1])) == 0x103 + 256


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """{name: a .zst file with a window above 128 MiB}. The first one's frame tells its size."""
    if not shutil.which("zstd"):
        pytest.skip("needs the command zstd")
    folder = tmp_path_factory.mktemp("wide")
    lines = GOOD * 8_300_000
    first = folder / "known.jsonl"
    first.write_bytes(lines)
    subprocess.run(["zstd", "-q", "-1", "--long=31", str(first)], check=True)
    with open(folder / "unknown.jsonl.zst", "wb") as out:
        subprocess.run(["zstd", "-q", "-1", "--long=31"], input=GOOD, stdout=out, check=True)
    return {name: folder / f"{name}.jsonl.zst" for name in ("known", "unknown")}


@pytest.mark.parametrize("name", ["known", "unknown"])
def test_a_long_window_is_no_damage(wide, name, monkeypatch):
    """Without the package that unpacks it, the file is refused and never left out."""
    monkeypatch.setitem(sys.modules, "zstandard", None)
    for on_error in ("stop", "skip"):
        with pytest.raises(UsageError, match="needs the package zstandard, because it looks back"):
            read(wide[name], on_error=on_error)


def test_a_later_frame_with_a_long_window_is_no_damage(wide, tmp_path):
    whole = pack(GOOD, ".zst") + wide["unknown"].read_bytes()
    (tmp_path / "a.jsonl.zst").write_bytes(whole)
    for on_error in ("stop", "skip"):
        with pytest.raises(UsageError, match="one of its frames looks back over more than 128 MiB"):
            read(tmp_path / "a.jsonl.zst", on_error=on_error)


def test_a_long_window_is_unpacked(wide, tmp_path):
    pytest.importorskip("zstandard", reason="the extra zstd is not installed")
    assert read(wide["unknown"])[0] == ["good"]
    [source] = sources.find_sources((str(wide["known"]),))
    with unpacking.opened(source) as file:
        assert file.read(len(GOOD) * 3) == GOOD * 3
        assert sum(len(block) for block in iter(lambda: file.read(1 << 20), b"")) == len(GOOD) * (
            8_300_000 - 3
        )

    packed = wide["unknown"].read_bytes()
    for number, content in enumerate((packed * 2, packed + pack(GOOD, ".zst"))):
        (tmp_path / f"{number}.jsonl.zst").write_bytes(content)
        assert read(tmp_path / f"{number}.jsonl.zst")[0] == ["good", "good"]
    for content in (packed[:-3], packed + b"garbage", packed[:8] + b"\xff" * 4 + packed[12:]):
        (tmp_path / "torn.jsonl.zst").write_bytes(content)
        with pytest.raises(UsageError, match=r"torn.jsonl.zst: a damaged or incomplete .zst file"):
            read(tmp_path / "torn.jsonl.zst")
