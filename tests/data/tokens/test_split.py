"""What is held out of a text. The tokenizer does not see it."""

import numpy as np
import pytest
from cached_texts import WORDS, data_for, ids, prepare, quiet, texts

from gpt_jax import config
from gpt_jax.data.tokenizers.bpe import train_bpe
from gpt_jax.errors import UsageError


def heldout_text(data):
    got = prepare(data, quiet)
    return got.tokenizer.decode_bytes(ids(got.eval))


def test_one_document_is_cut_as_nanogpt_cuts(tmp_path):
    text = WORDS * 37
    (tmp_path / "a.txt").write_text(text)
    data = config.Data(
        path=(str(tmp_path / "a.txt"),), tokenizer="char", cache=str(tmp_path / "cache")
    )
    got = prepare(data, quiet)
    code = {c: i for i, c in enumerate(sorted(set(text)))}
    cut = int(len(text) * 0.9)
    assert ids(got.train).tolist() == [code[c] for c in text[:cut]]
    assert ids(got.eval).tolist() == [code[c] for c in text[cut:]]
    assert got.tokenizer.vocab == len(code) and got.tokenizer.eot is None
    assert (got.train.bytes, got.eval.bytes) == (len(text[:cut].encode()), len(text[cut:].encode()))
    assert heldout_text(data) == text[cut:].encode()


@pytest.mark.parametrize("how", ["tail", "document"])
@pytest.mark.parametrize("tokenizer", ["bytes", "char", "bpe:270"])
def test_many_documents_stay_whole(folder, how, tokenizer):
    data = data_for(folder, split=how, tokenizer=tokenizer, eval_fraction=0.3)
    got = prepare(data, quiet)
    train, held = texts(got.train, got.tokenizer), texts(got.eval, got.tokenizer)
    files = [path.read_text() for path in sorted((folder / "text").iterdir())]
    assert [t for t in files if t in train] == train and [t for t in files if t in held] == held
    assert sorted(train + held) == sorted(files) and train and held
    assert "".join(held).encode() == heldout_text(data)
    assert tuple(map(got.eval.document_name, range(got.eval.documents))) == tuple(
        f"text/{files.index(t):02d}.txt" for t in held
    )
    assert got.eval.bytes == len("".join(held).encode()) and got.train.documents == len(train)
    ends = ids(got.train)[got.train.offsets[1:] - 1]
    assert got.tokenizer.eot is None or (ends == got.tokenizer.eot).all()
    if how == "tail":
        sizes = np.array([len(t) for t in files])
        assert len(held) == sum(np.cumsum(sizes) - sizes >= int(sizes.sum() * 0.7))


def test_tail_of_equal_documents_and_of_one_that_is_too_long(tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text("0123456789")
    data = config.Data(path=(str(tmp_path),), eval_fraction=0.2)
    assert heldout_text(data) == b"0123456789" * 2  # the first of them begins exactly at the cut
    (tmp_path / "9.txt").write_text("long" * 1000)
    assert heldout_text(data) == b"long" * 1000
    (tmp_path / "9.txt").write_text("x")
    (tmp_path / "0.txt").write_text("long" * 1000)
    assert heldout_text(data).startswith(b"0123456789")  # never the first


def test_split_by_document_moves_no_text_when_files_are_added(folder):
    data = data_for(folder, split="document", eval_fraction=0.4)
    before = heldout_text(data)
    (folder / "text" / "00.txt").rename(folder / "text" / "renamed.txt")
    (folder / "text" / "new.md").write_text("another text altogether")
    assert set(before.splitlines()) <= set(heldout_text(data).splitlines())


def test_held_out_text_of_its_own(folder):
    (folder / "held.txt").write_text("held out")
    got = prepare(data_for(folder, eval_path=(str(folder / "held.txt"),)), quiet)
    assert got.train.documents == 12 and texts(got.eval, got.tokenizer) == ["held out"]
    assert prepare(data_for(folder, eval_fraction=0.0), quiet).eval is None
    (folder / "held.txt").write_text("")
    with pytest.raises(UsageError, match=r"held.txt: no text in this file"):
        prepare(data_for(folder, eval_path=(str(folder / "held.txt"),)), quiet)


def test_bpe_sees_the_training_side_only(folder):
    (folder / "held.txt").write_text("zqzqzqzq " * 100)
    got = prepare(
        data_for(folder, tokenizer="bpe:280", eval_path=(str(folder / "held.txt"),)), quiet
    )
    alone = train_bpe((path.read_text() for path in sorted((folder / "text").iterdir())), 280)
    assert got.tokenizer.fingerprint == alone.fingerprint
    assert texts(got.eval, got.tokenizer) == ["zqzqzqzq " * 100]
