"""Token files of other tools: written as those tools write them, and read in place.

Torn and wrong ones are refused.
"""

import struct

import numpy as np
import pytest
from token_files import write_llmc, write_megatron, write_nanogpt

from gpt_jax.data.tokens import foreign
from gpt_jax.data.tokens.foreign import open_foreign
from gpt_jax.errors import UsageError

EOT = 50256
DOCUMENTS = [[1, 2, 3], [4], [], [5, 65535, 0]]
ENDED = [i for ids in DOCUMENTS for i in (*ids, EOT)]  # nanoGPT
BEGUN = [i for ids in DOCUMENTS for i in (EOT, *ids)]  # llm.c


def split(found):
    return [
        found.tokens[a:b].tolist() for a, b in zip(found.offsets, found.offsets[1:], strict=False)
    ]


def test_nanogpt(tmp_path):
    write_nanogpt(tmp_path / "train.bin", ENDED)
    found = open_foreign(tmp_path / "train.bin")
    assert found.kind == "nanogpt" and found.tokens.dtype == np.uint16 and split(found) == [ENDED]
    assert split(open_foreign(str(tmp_path / "train.bin"), EOT)) == [
        [*ids, EOT] for ids in DOCUMENTS
    ]
    assert isinstance(found.tokens.base, np.memmap) and found.offsets.dtype == np.int64
    with pytest.raises(ValueError, match="read-only"):
        found.tokens[0] = 1


@pytest.mark.parametrize(
    "magic, version, dtype", [(20240520, 1, np.uint16), (20240801, 7, np.uint32)]
)
def test_llmc(tmp_path, magic, version, dtype):
    big = [*BEGUN, EOT, 128000] if dtype == np.uint32 else BEGUN
    write_llmc(tmp_path / "a.bin", big, magic, version, dtype)
    found = open_foreign(tmp_path / "a.bin", EOT)
    assert found.kind == "llm.c" and found.tokens.dtype == dtype and found.tokens.tolist() == big
    assert split(found) == [[EOT, *ids] for ids in DOCUMENTS] + [[EOT, 128000]] * (
        dtype == np.uint32
    )
    assert split(open_foreign(tmp_path / "a.bin")) == [big]


@pytest.mark.parametrize("code, dtype, read", [(8, np.uint16, np.uint16), (4, np.int32, np.uint32)])
def test_megatron(tmp_path, code, dtype, read):
    documents = [*DOCUMENTS[:2], DOCUMENTS[3], [], [7, 8]]
    for tail in (b"", bytes(7)):  # multimodal sets say a mode for each sequence
        write_megatron(tmp_path / "a.bin", documents, dtype, code, tail=tail)
        for name in ("a.bin", "a.idx"):
            found = open_foreign(tmp_path / name)
            assert (
                found.kind == "megatron"
                and found.tokens.dtype == read
                and split(found) == documents
            )


def test_npy(tmp_path):
    for dtype, read in [(np.uint16, np.uint16), (np.uint32, np.uint32), (np.int32, np.uint32)]:
        np.save(tmp_path / "a.npy", np.array(BEGUN, dtype))
        found = open_foreign(tmp_path / "a.npy", EOT)
        assert (
            found.kind == "npy"
            and found.tokens.dtype == read
            and split(found) == [[EOT, *ids] for ids in DOCUMENTS]
        )


def random_ids(vocab, count=400):
    return np.random.default_rng(0).integers(0, vocab, count)


@pytest.mark.parametrize("vocab", [50_257, 128_001, 200_019])
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int64])
def test_a_bin_without_a_header_is_never_read_as_another_type(tmp_path, vocab, dtype):
    """Either the ids are those that were written, or the type has to be named."""
    ids = random_ids(min(vocab, np.iinfo(dtype).max)).astype(dtype)
    ids.tofile(tmp_path / "a.bin")
    for known in (vocab, 0):
        if dtype == np.uint16 and vocab < 2**16:
            assert (open_foreign(tmp_path / "a.bin", None, "auto", known).tokens == ids).all()
        elif dtype == np.uint16 and not known:
            continue  # without a vocabulary nothing speaks against it
        else:
            with pytest.raises(UsageError, match=r"a.bin: .*name the type, --config.data.token_ty"):
                open_foreign(tmp_path / "a.bin", None, "auto", known)

    if dtype == np.int64:
        with pytest.raises(UsageError, match="token_type = uint32 is 0, so its ids have 64 bits"):
            open_foreign(tmp_path / "a.bin", None, "uint32", vocab)
    else:
        found = open_foreign(tmp_path / "a.bin", None, np.dtype(dtype).name, vocab)
        assert found.tokens.dtype == dtype and (found.tokens == ids).all()


def test_small_vocabularies_and_short_files_are_uint16(tmp_path):
    """Every second id of a short file may be small by chance."""
    for ids in (random_ids(65, 4000), random_ids(2, 4000), np.zeros(4000), [500, 0] * 30):
        np.array(ids, np.uint16).tofile(tmp_path / "a.bin")
        assert open_foreign(tmp_path / "a.bin", None, "auto", 65).tokens.tolist() == list(ids)


def test_a_size_that_does_not_fit_the_named_type_is_refused(tmp_path):
    np.zeros(101, np.uint16).tofile(tmp_path / "a.bin")
    with pytest.raises(UsageError, match=r"has 202 bytes, so it is not made of config.data.token"):
        open_foreign(tmp_path / "a.bin", None, "uint32")
    assert len(open_foreign(tmp_path / "a.bin", None, "uint16").tokens) == 101


def test_documents_are_found_across_chunks(tmp_path, monkeypatch):
    write_nanogpt(tmp_path / "a.bin", ENDED)
    wanted = open_foreign(tmp_path / "a.bin", EOT).offsets.tolist()
    for size in (1, 2, 3):
        monkeypatch.setattr(foreign, "AT_ONCE", size)
        assert open_foreign(tmp_path / "a.bin", EOT).offsets.tolist() == wanted
    assert open_foreign(tmp_path / "a.bin", 999).offsets.tolist() == [0, len(ENDED)]


def cut_by(path, count):
    path.write_bytes(path.read_bytes()[:-count])


WRONG = {  # a writer into a folder, and what is said of a.bin
    "odd": (lambda d: (d / "a.bin").write_bytes(b"abc"), "a.bin: has 3 bytes, an odd number"),
    "empty": (lambda d: (d / "a.bin").write_bytes(b""), "a.bin: holds no tokens"),
    "missing": (lambda d: None, "a.bin: cannot be read: No such file"),
    "llm.c torn": (
        lambda d: (write_llmc(d / "a.bin", BEGUN), cut_by(d / "a.bin", 2)),
        "a.bin: has .* its header of 11 tokens",
    ),
    "llm.c too long": (
        lambda d: write_llmc(d / "a.bin", BEGUN, count=3),
        "a.bin: has .* its header of 3 tokens",
    ),
    "llm.c negative": (
        lambda d: write_llmc(d / "a.bin", [], count=-1),
        "a.bin: has .* its header of -1 tokens",
    ),
    "llm.c header": (
        lambda d: (write_llmc(d / "a.bin", []), cut_by(d / "a.bin", 4)),
        "a.bin: ends inside its header, at byte 1020",
    ),
    "llm.c version": (
        lambda d: write_llmc(d / "a.bin", BEGUN, version=2),
        "of version 2; read is version 1",
    ),
    "llm.c questions": (
        lambda d: write_llmc(d / "a.bin", BEGUN, 20240522),
        "a.bin: holds llm.c's multiple-choice",
    ),
    "llm.c empty": (lambda d: write_llmc(d / "a.bin", []), "a.bin: holds no tokens"),
    "megatron magic": (
        lambda d: write_megatron(d / "a.bin", DOCUMENTS, magic=b"TNTIDX\0\0\0"),
        "a.idx: not an index of Megatron",
    ),
    "megatron version": (
        lambda d: write_megatron(d / "a.bin", DOCUMENTS, version=2),
        "a.idx: not an index .*version 2",
    ),
    "megatron type": (
        lambda d: write_megatron(d / "a.bin", DOCUMENTS, code=7),
        "a.idx: ids of Megatron's type 7",
    ),
    "megatron torn": (
        lambda d: (write_megatron(d / "a.bin", DOCUMENTS), cut_by(d / "a.idx", 3)),
        "a.idx: has .* its header says",
    ),
    "megatron head": (
        lambda d: (
            write_megatron(d / "a.bin", DOCUMENTS),
            (d / "a.idx").write_bytes(b"MMIDIDX\0\0"),
        ),
        "a.idx: ends inside its header, at byte 9",
    ),
    "megatron ids torn": (
        lambda d: (write_megatron(d / "a.bin", DOCUMENTS), cut_by(d / "a.bin", 2)),
        "a.bin: has 12 bytes, a.idx says 14",
    ),
    "megatron order": (
        lambda d: (
            write_megatron(d / "a.bin", DOCUMENTS),
            (d / "a.idx").write_bytes(
                (d / "a.idx").read_bytes()[:34] + bytes([9]) + (d / "a.idx").read_bytes()[35:]
            ),
        ),
        "a.idx: its sequences do not lie",
    ),
    "megatron documents": (
        lambda d: (
            write_megatron(d / "a.bin", DOCUMENTS),
            (d / "a.idx").write_bytes((d / "a.idx").read_bytes()[:-8] + struct.pack("<q", 99)),
        ),
        "a.idx: its documents are not",
    ),
    "megatron backwards": (
        lambda d: (
            write_megatron(d / "a.bin", DOCUMENTS),
            (d / "a.idx").write_bytes(
                (d / "a.idx").read_bytes()[:-32] + struct.pack("<4q", 3, 1, 4, 6)
            ),
        ),
        "a.idx: its documents are not",
    ),
    "index alone": (
        lambda d: (write_megatron(d / "a.bin", DOCUMENTS), (d / "a.idx").rename(d / "a.bin")),
        "a.bin: is an index of Megatron",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_files_of_no_use(tmp_path, name):
    write, message = WRONG[name]
    write(tmp_path)
    with pytest.raises(UsageError, match=message):
        open_foreign(tmp_path / "a.bin", EOT)


@pytest.mark.parametrize(
    "content, message",
    [
        (np.zeros((2, 2), np.uint16), r"holds uint16 \[2, 2\]"),
        (np.zeros(3, np.float32), "holds float32"),
        (np.zeros(0, np.uint16), "holds no tokens"),
        (b"no array", "not a readable .npy"),
        (
            b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<u2', 'shape': (3,(".ljust(118),
            "not a readable",
        ),
        (b"\x93NUMPY\x01\x00v\x00" + b"[" * 118, "not a readable .npy"),
    ],
)
def test_arrays_of_no_use(tmp_path, content, message):
    if isinstance(content, bytes):
        (tmp_path / "a.npy").write_bytes(content)
    else:
        np.save(tmp_path / "a.npy", content)
    with pytest.raises(UsageError, match=message):
        open_foreign(tmp_path / "a.npy")


def test_other_names(tmp_path):
    (tmp_path / "a.txt").write_text("ab")
    with pytest.raises(
        UsageError, match=r"a.txt: token files of other tools end in .bin, .idx or .npy"
    ):
        open_foreign(tmp_path / "a.txt")
