"""Runs on token files of other tools."""

import numpy as np
import pytest
import runs

from gpt_jax import config
from gpt_jax.data import dataset
from gpt_jax.data.tokenizer import byte_tokenizer
from gpt_jax.errors import UsageError


def write_llmc(path, ids):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(ids)
    path.write_bytes(header.tobytes() + ids.astype("<u2").tobytes())
    return path


def documents(sizes, seed=0):
    rng = np.random.default_rng(seed)
    return np.concatenate([np.append(rng.integers(97, 123, size), 256) for size in sizes])


def load(path, **changes):
    return dataset.load(config.Data(path=(str(path),), cache=str(path.parent / "cache"),
                                    **{"tokenizer": "bytes", **changes}),
                        lambda line: None)


@pytest.mark.parametrize("write", [lambda path, ids: ids.astype("<u2").tofile(path), write_llmc])
def test_documents_and_split(tmp_path, write):
    ids = documents([5, 9, 30, 6, 40])
    write(tmp_path / "a.bin", ids)
    part = load(tmp_path / "a.bin", eval_fraction=0.3).parts[0]
    assert part.train.ids(0, part.train.size).tolist() + part.eval.ids(0, part.eval.size).tolist() == ids.tolist()
    assert np.diff(part.train.offsets).tolist() == [6, 10, 31, 7] and np.diff(part.eval.offsets).tolist() == [41]
    assert (part.train.bytes, part.eval.bytes) == (50, 40) and part.eval.document_name(0) == "a.bin:5"
    assert load(tmp_path / "a.bin", eval_fraction=0.0).parts[0].eval is None


def test_one_document_is_cut_and_a_file_of_its_own_is_held_out(tmp_path):
    ids = np.full(100, 97)
    ids.astype("<u2").tofile(tmp_path / "train.bin")
    part = load(tmp_path / "train.bin", eval_fraction=0.2).parts[0]
    assert (part.train.size, part.eval.size) == (80, 20)
    documents([7]).astype("<u2").tofile(tmp_path / "val.bin")
    both = load(tmp_path / "train.bin", eval_path=(str(tmp_path / "val.bin"),))
    assert (both.parts[0].train.size, both.parts[0].eval.size) == (100, 8)
    ids[0] = 98
    ids.astype("<u2").tofile(tmp_path / "train.bin")
    assert load(tmp_path / "train.bin", eval_path=(str(tmp_path / "val.bin"),)).content != both.content


@pytest.mark.parametrize("ids, tokenizer, words", [
    ([97, 98, 300], "bytes", "holds the id 300, and config.data.tokenizer = bytes has 257 ids"),
    ([97, 98, 99], "", "does not say which tokenizer made its ids"),
    ([97, 98, 99], "bpe:300", "does not say which tokenizer made its ids"),
])
def test_token_files_that_cannot_be_used(tmp_path, ids, tokenizer, words):
    np.array(ids, "<u2").tofile(tmp_path / "a.bin")
    with pytest.raises(UsageError, match=words):
        load(tmp_path / "a.bin", tokenizer=tokenizer)


def test_a_run_on_a_token_file_is_the_run_on_its_text(tmp_path):
    text = runs.write_text(tmp_path / "text.txt", words=3000)
    byte_tokenizer().encode(text.read_text()).astype("<u2").tofile(tmp_path / "text.bin")
    for name in ("text.txt", "text.bin"):
        runs.call(*runs.arguments(tmp_path, tmp_path / name.replace(".", "_"), f"--config.data.path={tmp_path / name}",
                                  "--config.data.rows=chunk", "--config.train.steps=4",
                                  "--config.data.eval_fraction=0.0",
                                  "--config.optim.warmup_steps=1"))
    assert runs.curve(tmp_path / "text_txt") == runs.curve(tmp_path / "text_bin")
