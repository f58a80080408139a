"""Runs on token files of other tools."""

import os

import numpy as np
import pytest
import runs
from token_files import write_llmc, write_megatron

from gpt_jax import config
from gpt_jax.data.stream import dataset
from gpt_jax.data.tokenizers.vocabulary import make_byte_tokenizer
from gpt_jax.errors import DataError, UsageError


def documents(sizes, seed=0):
    rng = np.random.default_rng(seed)
    return np.concatenate([np.append(rng.integers(97, 123, size), 256) for size in sizes])


def load(where, **changes):
    return dataset.load_dataset(
        config.Data(
            **{
                "path": (str(where),),
                "cache": str(where.parent / "cache"),
                "tokenizer": "bytes",
                **changes,
            }
        ),
        lambda line: None,
    )


@pytest.mark.parametrize("write", [lambda path, ids: ids.astype("<u2").tofile(path), write_llmc])
def test_documents_and_split(tmp_path, write):
    ids = documents([5, 9, 30, 6, 40])
    write(tmp_path / "a.bin", ids)
    part = load(tmp_path / "a.bin", eval_fraction=0.3).parts[0]

    assert (
        part.train.ids(0, part.train.size).tolist() + part.eval.ids(0, part.eval.size).tolist()
        == ids.tolist()
    )
    assert np.diff(part.train.offsets).tolist() == [6, 10, 31, 7] and np.diff(
        part.eval.offsets
    ).tolist() == [41]
    assert (part.train.bytes, part.eval.bytes) == (50, 40) and part.eval.document_name(
        0
    ) == "a.bin:5"
    assert load(tmp_path / "a.bin", eval_fraction=0.0).parts[0].eval is None


def test_the_type_of_ids_without_a_header_is_named_by_the_config(tmp_path):
    """The same bytes are other ids, and so another content."""
    ids = documents([50, 90, 300, 60])
    ids.astype("<u4").tofile(tmp_path / "a.bin")
    with pytest.raises(UsageError, match=r"a.bin: .*probably uint32; name the type, --config.data"):
        load(tmp_path / "a.bin")

    loaded = load(tmp_path / "a.bin", token_type="uint32", eval_path=(str(tmp_path / "a.bin"),))
    part = loaded.parts[0]
    assert part.train.ids(0, part.train.size).tolist() == ids.tolist()
    assert part.eval.ids(0, part.eval.size).tolist() == ids.tolist()
    assert part.train.documents == part.eval.documents == 4

    as_words = load(tmp_path / "a.bin", token_type="uint16", eval_path=(str(tmp_path / "a.bin"),))
    assert as_words.parts[0].train.size == 2 * len(ids) and as_words.content != loaded.content
    heldout = dataset.load_heldout(
        str(tmp_path / "a.bin"),
        config.Data(token_type="uint32"),
        make_byte_tokenizer(),
        lambda line: None,
    )
    assert [tokens.size for tokens in heldout.values()] == [len(ids)]


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
    assert (
        load(tmp_path / "train.bin", eval_path=(str(tmp_path / "val.bin"),)).content != both.content
    )


@pytest.mark.parametrize(
    "ids, tokenizer, words",
    [
        ([97, 98, 300], "bytes", "holds the id 300, and config.data.tokenizer = bytes has 257 ids"),
        ([97, 98, 99], "", "does not say which tokenizer made its ids"),
        ([97, 98, 99], "bpe:300", "does not say which tokenizer made its ids"),
    ],
)
def test_token_files_that_cannot_be_used(tmp_path, ids, tokenizer, words):
    np.array(ids, "<u2").tofile(tmp_path / "a.bin")
    with pytest.raises(UsageError, match=words):
        load(tmp_path / "a.bin", tokenizer=tokenizer)


def test_a_run_on_a_token_file_is_the_run_on_its_text(tmp_path):
    text = runs.write_text(tmp_path / "text.txt", words=3000)
    make_byte_tokenizer().encode(text.read_text()).astype("<u2").tofile(tmp_path / "text.bin")
    for name in ("text.txt", "text.bin"):
        runs.call(
            *runs.arguments(
                tmp_path,
                tmp_path / name.replace(".", "_"),
                f"--config.data.path={tmp_path / name}",
                "--config.data.packing=chunk",
                "--config.train.steps=4",
                "--config.data.eval_fraction=0.0",
                "--config.optim.warmup_steps=1",
            )
        )

    assert runs.curve(tmp_path / "text_txt") == runs.curve(tmp_path / "text_bin")


def test_shards_are_one_source(tmp_path):
    """They are as llm.c writes them: end of text comes first, and they are cut anywhere."""
    ids = np.concatenate([np.roll(documents([size], size), 1) for size in (5, 9, 30, 6, 40)])
    for number, part in enumerate(np.split(ids, [20, 70])):
        write_llmc(tmp_path / f"web_train_{number:06d}.bin", part)
    write_llmc(tmp_path / "web_val_000000.bin", ids[:25])
    names = ["web_train_*.bin", "web_train_*"]
    for name in names:
        part = load(tmp_path / name, eval_fraction=0.3).parts[0]
        assert (
            part.train.ids(0, part.train.size).tolist() + part.eval.ids(0, part.eval.size).tolist()
            == ids.tolist()
        )
    # Documents begin at the end of text (0, 6, 16, 47, 54) and with each file (20, 70).
    begins = [0, 6, 16, 20, 47, 54]
    assert part.train.offsets.tolist() == [*begins, 70] and part.eval.offsets.tolist() == [0, 25]
    assert [part.train.document_name(i) for i in range(6)] == [
        "web_train_000000.bin:1",
        "web_train_000000.bin:2",
        "web_train_000000.bin:3",
        "web_train_000001.bin:1",
        "web_train_000001.bin:2",
        "web_train_000001.bin:3",
    ] and part.eval.document_name(0) == "web_train_000002.bin"
    assert part.train.bytes + part.eval.bytes == 90
    data = load(tmp_path / names[0], eval_path=(str(tmp_path / "web_val_*.bin"),))
    assert (data.parts[0].train.size, data.parts[0].eval.size) == (95, 25)
    listed = tuple(str(tmp_path / f"web_train_{number:06d}.bin") for number in range(3))
    same = load(tmp_path / names[0], path=listed, eval_path=(str(tmp_path / "web_val_000000.bin"),))
    assert same.content == data.content
    two = load(
        tmp_path / names[0],
        path=(),
        sources=(
            ("a", str(tmp_path / names[0]), 1.0),
            ("b", str(tmp_path / "web_val_000000.bin"), 1.0),
        ),
    )
    assert [part.train.size + part.eval.size for part in two.parts] == [95, 25]
    said = dataset.load_heldout(
        str(tmp_path / names[0]), config.Data(), make_byte_tokenizer(), print
    )
    assert next(iter(said.values())).size == 95


def test_the_folder_of_nanogpt_and_the_prefix_of_megatron(tmp_path):
    folder = tmp_path / "shakespeare"
    folder.mkdir()
    documents([9, 9, 9]).astype("<u2").tofile(folder / "train.bin")
    documents([7]).astype("<u2").tofile(folder / "val.bin")
    part = load(folder).parts[0]
    assert (part.train.size, part.eval.size) == (30, 8)
    assert (
        next(
            iter(
                dataset.load_heldout(
                    str(folder), config.Data(), make_byte_tokenizer(), print
                ).values()
            )
        ).size
        == 8
    )

    (folder / "input.txt").write_text("text")
    with pytest.raises(
        UsageError, match=r"holds both text \(input.txt\) and token files .*eval_path=.*/val.bin"
    ):
        load(folder)

    write_megatron(tmp_path / "web_document.bin", [[97, 98, 99], [97], [98, 99]])
    for name in ("web_document", "web_document.bin", "web_document.idx", "web_document.*", "web_*"):
        part = load(tmp_path / name, eval_fraction=0.3).parts[0]
        assert part.train.offsets.tolist() == [0, 3, 4] and part.eval.size == 2


def test_another_index_is_another_content(tmp_path):
    """The documents of Megatron's two files are told in its .idx."""
    found = set()
    for split in ([[97, 98], [99, 97]], [[97], [98], [99, 97]]):
        write_megatron(tmp_path / "a.bin", split)
        found.add(load(tmp_path / "a.bin", eval_fraction=0.0).content)
    assert len(found) == 2


@pytest.mark.parametrize(
    "write",
    [
        lambda path, ids: ids.astype("<u2").tofile(path),
        write_llmc,
        lambda path, ids: np.save(path, ids.astype("<u2")),
    ],
)
def test_a_file_that_shrinks_is_named(tmp_path, write):
    """It is read by place, because a page of a map that is gone would kill the process."""
    path = tmp_path / ("a.npy" if "save" in write.__code__.co_names else "a.bin")
    write(path, documents([5000]))
    tokens = load(path, eval_fraction=0.0).parts[0].train
    assert tokens.ids(4990, 5001).tolist() == documents([5000])[4990:].tolist()
    os.truncate(path, 4096)
    with pytest.raises(DataError, match=f"{path.name}: changed during the run.* has 4096"):
        tokens.ids(4990, 5001)


def test_token_files_that_cannot_be_joined(tmp_path):
    np.array([97, 98], "<u2").tofile(tmp_path / "a.bin")
    np.save(tmp_path / "b.npy", np.array([97, 98], np.uint32))
    (tmp_path / "c.txt").write_text("text")

    for names, words in (
        (("a.bin", "b.npy"), "b.npy: holds uint32 and .*a.bin uint16"),
        (("a.bin", "c.txt"), "c.txt is no token file and cannot be joined"),
        (("c.txt", "a.bin"), "c.txt is no token file"),
        (("?.bin", "none.bin"), "none.bin: cannot be read"),
        (("d_*.bin",), "d_.*no file matches"),
        (("e*",), "no file matches"),
    ):
        with pytest.raises(UsageError, match=words):
            load(tmp_path / "x", path=tuple(str(tmp_path / name) for name in names))
    for text in (tmp_path / "a.bin", tmp_path / "c.txt"):
        with pytest.raises(
            UsageError,
            match=r"c.txt is no token file|eval_path = .* no usable files; read are .* .npy",
        ):
            load(
                text,
                eval_path=(
                    str(tmp_path / "c.txt" if text.suffix == ".bin" else tmp_path / "a.bin"),
                ),
            )


def test_prepare_says_that_token_files_are_read_in_place(tmp_path):
    np.array([97, 98], "<u2").tofile(tmp_path / "a.bin")
    code, line = runs.refusal(
        "prepare", f"--input={tmp_path / 'a.bin'}", f"--output={tmp_path / 'out'}"
    )
    assert code == 2 and ".bin .idx .npy" in line and "in place, as config.data.path" in line
