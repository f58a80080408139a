"""A prepared folder: opened, looked into and verified.

Damage is named and never read over.
"""

import json
import os
import shutil
from pathlib import Path

import fsspec
import pytest
import runs
from prepared import documents, flip, prepare, refused, texts, write_jsonl

from gpt_jax import config
from gpt_jax.data.read import sources
from gpt_jax.data.stream import dataset
from gpt_jax.data.tokenizers.vocabulary import make_char_tokenizer
from gpt_jax.data.tokens import corpus, shards
from gpt_jax.errors import DataError, UsageError


def test_a_corpus_reads_the_same_wherever_it_lies(made, copy):
    assert corpus.is_corpus(copy) and not corpus.is_corpus(copy / "a")
    assert (
        documents(copy) == documents(made)
        and corpus.open_corpus(copy).content == corpus.open_corpus(made).content
    )
    runs.call("prepare", f"--verify={copy}")


def test_sides_without_a_document_are_none(tmp_path):
    out = prepare(tmp_path / "out", f"--input={write_jsonl(tmp_path / 'a.jsonl', texts(3))}")
    assert corpus.open_corpus(out).sources["text"]["eval"] is None
    assert corpus.open_corpus(out).sources["text"]["train"].documents == 3


def reseal(path: Path, **changes) -> None:
    manifest = json.loads(path.read_bytes())
    path.write_bytes(corpus.seal({k: v for k, v in manifest.items() if k != "digest"} | changes))


# what is done to a folder; the code and words of opening it; whether --verify names the file
DAMAGE = {
    "cut shard": (
        lambda f: os.truncate(f / "a/train-00001.tokens", 100),
        20,
        ("train-00001.tokens", "has 100 bytes", "--verify"),
        "a/train-00001.tokens",
    ),
    "lost shard": (
        lambda f: (f / "b/train-00000.tokens").unlink(),
        20,
        ("b/train-00000.tokens", "No such file"),
        "b/train-00000.tokens",
    ),
    "longer index": (
        lambda f: os.truncate(f / "a/eval.offsets", 4096),
        20,
        ("a/eval.offsets",),
        "a/eval.offsets",
    ),
    "flipped bit in a shard": (
        lambda f: flip(f / "b/train-00000.tokens"),
        0,
        (),
        "b/train-00000.tokens",
    ),
    "flipped bit in an index": (lambda f: flip(f / "a/train.docs"), 0, (), "a/train.docs"),
    "flipped bit in the manifest": (
        lambda f: flip(f / "corpus.json", 300),
        20,
        ("corpus.json", "damaged"),
        None,
    ),
    "cut manifest": (
        lambda f: os.truncate(f / "corpus.json", 300),
        20,
        ("corpus.json", "damaged"),
        None,
    ),
    "nested manifest": (
        lambda f: (f / "corpus.json").write_text("[" * 200_000),
        20,
        ("corpus.json", "damaged"),
        None,
    ),
    "manifest of another type of ids": (
        lambda f: reseal(f / "corpus.json", dtype="zz"),
        20,
        ("corpus.json", "dtype: expected one of uint16, uint32"),
        None,
    ),
    "manifest with other files": (
        lambda f: reseal(f / "corpus.json", files={"a": 3}),
        20,
        ("corpus.json", "files.a: expected a list"),
        None,
    ),
    "manifest without what was left out": (
        lambda f: reseal(f / "corpus.json", counts={}),
        20,
        ("corpus.json", "counts.documents: missing"),
        None,
    ),
    "another format": (lambda f: reseal(f / "corpus.json", format=99), 2, ("format 99",), None),
    "another tokenizer": (
        lambda f: (f / "tokenizer.json").write_text(make_char_tokenizer("ab").to_json()),
        20,
        ("tokenizer.json",),
        "tokenizer.json",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage(case, copy, capsys):
    damage, code, words, named = DAMAGE[case]
    damage(copy)
    if code:
        assert refused(code, words, f"--inspect={copy}")
    else:
        corpus.open_corpus(copy)
    refused(20 if named else code, (str(copy), named or ""), f"--verify={copy}")
    assert named is None or str(copy / named) in capsys.readouterr().err


def test_a_tokenizer_of_the_same_size_is_not_taken_for_the_right_one(copy):
    path = copy / "tokenizer.json"
    other = make_char_tokenizer("ab").to_json()
    other += " " * (path.stat().st_size - len(other))
    path.write_text(other)
    refused(
        20,
        ("tokenizer.json", make_char_tokenizer("ab").fingerprint, "put back"),
        f"--inspect={copy}",
    )


def test_a_flipped_bit_in_offsets_is_seen_or_named(copy):
    """A bit that would send a reader beyond the shards is seen at once."""
    path = copy / "a/train.offsets"
    flip(path, path.stat().st_size - 8)
    with pytest.raises(DataError, match=r"a/train.offsets does not fit"):
        corpus.open_corpus(copy)


def test_what_is_no_corpus(tmp_path):
    refused(2, ("nowhere", "no corpus.json"), f"--inspect={tmp_path / 'nowhere'}")
    (tmp_path / "half/work").mkdir(parents=True)
    refused(
        2, ("half", "unfinished", "run the same command again"), f"--verify={tmp_path / 'half'}"
    )


def copied(made, tmp_path, unfinished: bool):
    """A folder that holds an output of prepare, and that output."""
    out = tmp_path / "data/out"
    shutil.copytree(made, out)
    if unfinished:
        (out / "corpus.json").unlink()
        (out / "work").mkdir()
        (out / "work/settings.json").write_text("{}")
        (out / "work/lock").touch()
    return tmp_path / "data", out


@pytest.mark.parametrize("unfinished", [False, True])
def test_an_output_is_not_read_as_text(made, tmp_path, unfinished):
    """Its indexes are .json, which would be read."""
    outer, out = copied(made, tmp_path, unfinished)
    words = f"{out}: was made by gpt-jax prepare, "
    words += "which has not finished" if unfinished else "whose output is tokens"
    store = fsspec.filesystem("memory")
    store.put(str(outer), "/bucket/data", recursive=True)
    for path in (out, outer, f"{outer}/*"):
        with pytest.raises(UsageError, match=f"--text = '.*{words}"):
            sources.find_sources((str(path),), "--text")
        refused(2, ("--input text", words), f"--input={path}", f"--output={tmp_path / 'new'}")
    with pytest.raises(UsageError, match="memory://bucket/data/out: was made by gpt-jax prepare"):
        sources.find_sources(("memory://bucket/data",))

    store.rm("/bucket/data", recursive=True)
    (outer / "corpus.json").write_text('[{"text": "a file of this name is as good as any"}]')
    shutil.rmtree(out)
    assert len(sources.find_sources((str(outer),))) == 1


def test_an_unfinished_folder_does_not_train(made, tmp_path):
    _outer, out = copied(made, tmp_path, True)
    data = config.Data(path=(str(out),), cache=str(tmp_path / "cache"))
    with pytest.raises(
        UsageError, match=r"config.data.path = .*has not finished; run the same command again"
    ):
        dataset.load_dataset(data, lambda line: None)

    shutil.copytree(made, tmp_path / "held")
    (tmp_path / "a.txt").write_text("some words of text")
    data = config.Data(
        path=(str(tmp_path / "a.txt"),), eval_path=(str(tmp_path / "held"),), cache=data.cache
    )
    with pytest.raises(
        UsageError, match=r"config.data.eval_path = .*whose output is tokens and no text"
    ):
        dataset.load_dataset(data, lambda line: None)


def test_inspect_tells_what_is_inside(made, capsys):
    capsys.readouterr()
    runs.call("prepare", f"--inspect={made}")
    out = capsys.readouterr().out
    opened = corpus.open_corpus(made)
    tokens = opened.sources["b"]["train"]
    for wanted in (
        opened.tokenizer.fingerprint,
        "bpe:300",
        "bytes/token",
        f"{tokens.size:,}",
        "122 documents with",
        "copies of another document inside: 1",
        "b.jsonl:1",
        "not looked for",
        "'long long",
    ):
        assert wanted in out, wanted

    assert out.index("b.jsonl:1\n") < out.index("b/train: samples")  # the longest first
    assert f"{tokens.bytes / tokens.size:.3f}" in out and f"{tokens.size / tokens.bytes:.4f}" in out


@pytest.mark.parametrize(
    "name, place, words",
    [
        ("a/origins.json", 0, "origins.json: damaged"),
        ("a/train.offsets", 8 * 5 + 7, "offsets does not fit its meta"),
        ("a/train.offsets", 8 * 5 + 2, "offsets does not fit its meta"),
    ],
)
def test_a_flipped_byte_of_an_index_is_named_when_it_is_opened(copy, name, place, words):
    flip(copy / name, place)
    with pytest.raises(DataError, match=words):
        corpus.open_corpus(copy)


def test_a_record_that_points_nowhere_is_damage(copy):
    flip(copy / "a/train.docs", shards.DOCUMENT.itemsize - 1)
    tokens = corpus.open_corpus(copy).sources["a"]["train"]
    with pytest.raises(DataError, match="its record is damaged"):
        tokens.document_name(0)
