"""Damaged files are named in one line, whatever a library says of them."""

import bz2
import gzip
import json
import lzma
import random
import re
import struct

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from tables import read

from gpt_jax.data.read import documents as readers, sources
from gpt_jax.data.read.decoding import Damaged, Reading
from gpt_jax.data.read.documents import Tally
from gpt_jax.data.read.sources import Source
from gpt_jax.errors import UsageError

LONG = ["a" * 20, "b" * 30, "c" * 40]
PLACES = {  # of the texts in a file of Arrow: (type, layout of the places, the true ones, others)
    "string": (pyarrow.string(), "<4i", (0, 20, 50, 90), (0, 20, 1 << 30, 90)),
    "large string": (pyarrow.large_string(), "<4q", (0, 20, 50, 90), (0, 20, 1 << 60, 90)),
    "view": (pyarrow.string_view(), "<i4sii", (30, b"bbbb", 0, 20), (30, b"bbbb", 0, 1 << 30)),
    "dictionary": (
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        "<3i",
        (0, 1, 2),
        (0, 1 << 28, 2),
    ),
    "its values": (
        pyarrow.dictionary(pyarrow.int8(), pyarrow.string()),
        "<4i",
        (0, 20, 50, 90),
        (0, 20, 1 << 30, 90),
    ),
}


@pytest.mark.parametrize("make", [pyarrow.ipc.new_file, pyarrow.ipc.new_stream])
@pytest.mark.parametrize("name", PLACES)
def test_places_that_lie_outside_are_damage(tmp_path, name, make):
    """Following them would end the process."""
    kind, layout, true, wrong = PLACES[name]
    column = pyarrow.table({"text": pyarrow.array(LONG).cast(kind)})
    path = tmp_path / "a.arrow"
    with make(str(path), column.schema) as out:
        out.write_table(column)
    [source], raw, skip, tally = (
        sources.find_sources((str(path),)),
        path.read_bytes(),
        Reading(on_error="skip"),
        Tally(),
    )
    assert (
        read([readers.whole_piece(source)], Reading()) == LONG
        and raw.count(struct.pack(layout, *true)) == 1
    )

    path.write_bytes(raw.replace(struct.pack(layout, *true), struct.pack(layout, *wrong)))
    with pytest.raises(UsageError, match=r"a.arrow: not a readable Arrow file: .*copy it again"):
        read([readers.whole_piece(source)], Reading())
    assert read([readers.whole_piece(source)], skip, tally) == [] and tally.skipped == 1


@pytest.mark.parametrize("checksums", [True, False])
def test_damage_in_parquet_is_named_in_one_line(tmp_path, checksums):
    texts = ["".join(random.Random(i).choices("ab", k=99)) for i in range(99)]
    path = tmp_path / "a.parquet"
    told = 0
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts}), path, compression="none", write_page_checksum=checksums
    )
    [source], raw = sources.find_sources((str(path),)), path.read_bytes()
    for at in [*range(4, 60), *range(5000, 5100), *range(len(raw) - 400, len(raw))]:
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        try:
            assert (
                read(readers.cut_source(source, 1, Reading()), Reading()) == texts or not checksums
            )
        except UsageError as error:
            assert (
                re.search(
                    r"a.parquet: (a damaged or incomplete .parquet file|not a readable parquet "
                    r"file|config.data)",
                    str(error),
                )
                or not checksums
            )
            assert str(error).isprintable()
            told += "incomplete .parquet file" in str(error)

    assert told > 20


def test_only_files_that_libraries_unpack_are_damaged_by_an_error_without_a_number():
    for name, kind in [
        ("a.txt", UsageError),
        ("a.txt.gz", Damaged),
        ("a.parquet", Damaged),
        ("a.arrow", Damaged),
    ]:
        with pytest.raises(UsageError, match=f"{name}: ") as told:
            with readers._damage(Source(name, name)):
                raise OSError("torn")
        assert type(told.value) is kind


@pytest.mark.parametrize(
    "name", ["a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst", "a.jsonl.bz2", "a.parquet", "a.txt.gz"]
)
def test_the_rest_of_a_damaged_file_is_an_error_or_counted(tmp_path, name):
    """The files after it are read in either case."""
    rows = [f"{i} " + "".join(random.Random(i).choices("abcdefgh", k=400)) for i in range(4000)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in rows).encode()
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": rows}), tmp_path / name)
    else:
        pack = {
            ".gz": gzip.compress,
            ".xz": lzma.compress,
            ".bz2": bz2.compress,
            ".zst": lambda raw: bytes(pyarrow.compress(raw, "zstd", asbytes=True)),
        }[name[name.rindex(".") :]]
        (tmp_path / name).write_bytes(pack(lines))
    torn = tmp_path / name
    torn.write_bytes(torn.read_bytes()[: -torn.stat().st_size // 3])
    (tmp_path / "b.jsonl").write_text('{"text": "after"}\n')
    found = sources.find_sources((str(tmp_path),))
    with pytest.raises(UsageError, match=rf"{name}: .*; copy it again, or .*--on_error=skip"):
        read(
            [piece for source in found for piece in readers.cut_source(source, 1 << 30, Reading())],
            Reading(),
        )

    skip = Reading(on_error="skip")
    tally = Tally()
    got = read(
        [piece for source in found for piece in readers.cut_source(source, 1 << 30, skip)],
        skip,
        tally,
    )
    whole = [text for text in got[:-1] if name.startswith("a.jsonl")]
    assert got == [*whole, "after"] and whole == rows[: len(whole)] and len(whole) < 3900
    assert (
        tally.skipped == 1
        and f"{name}: " in tally.places[0]
        and "the rest of the file is left out" in tally.places[0]
    )
    assert len(whole) > 100 or name in ("a.parquet", "a.txt.gz", "a.jsonl.bz2")
