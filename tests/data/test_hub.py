"""`gpt-jax prepare` of data sets of Hugging Face.

They are cut into units and held to one revision, and the tokenizer's sample is bounded. The sets
are folders of this machine. A stand-in answers for the hub, because no test has a network.
"""

import json
from types import SimpleNamespace

import pytest
import runs
from prepared import contents, documents, prepare, refused, texts, write_jsonl

from gpt_jax.data.prepare import own_tokenizer, units
from gpt_jax.data.read import hub
from gpt_jax.data.tokenizers.bpe import train_bpe

datasets = pytest.importorskip("datasets", reason="the extra hf is not installed")
HEAD = "a" * 40
NEXT = "b" * 40


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A set of three files in its train split, and one file in another split."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for i in range(3):
        write_jsonl(tmp_path / f"set/train-{i}.jsonl", texts(40, i))
    write_jsonl(tmp_path / "set/test-0.jsonl", texts(200, 9))
    return tmp_path


ALL = [text for i in range(3) for text in texts(40, i)]


def tokens_units(monkeypatch) -> list[str]:
    """A list to which the name of each unit is added when it is tokenized."""
    made = []
    run = units.tokenize
    monkeypatch.setattr(
        units,
        "tokenize",
        lambda job, unit, tick, **more: made.append(unit.name) or run(job, unit, tick, **more),
    )
    return made


@pytest.mark.parametrize("sizes_known", [True, False])
def test_shards_are_units_and_the_output_is_that_of_one(folder, monkeypatch, sizes_known):
    given = [
        f"--input=hf://{folder / 'set'}",
        "--piece_mb=0.004" if sizes_known else "--piece_mb=64",
    ]
    if sizes_known:
        two = contents(prepare(folder / "two", *given, workers=2))
    else:
        monkeypatch.setattr(hub, "sizes", lambda path: [0, 0, 0])
    made = tokens_units(monkeypatch)
    out = prepare(folder / "out", *given)

    assert (
        made == [f"text-{i:05d}" for i in range(3)]
        and len(list((out / "text").glob("train-*.tokens"))) == 3
    )
    assert documents(out)["text"]["train"] == ALL
    assert not sizes_known or contents(out) == two


def test_the_size_of_a_set_is_that_of_its_split(folder):
    path = f"hf://{folder / 'set'}"
    assert hub.sizes(path) == [(folder / f"set/train-{i}.jsonl").stat().st_size for i in range(3)]
    assert hub.stamp(path)[0] == sum(hub.sizes(path)) < hub.stamp(f"{path}@test")[0]


def test_a_changed_folder_is_another_input(folder):
    out = prepare(folder / "out", given := f"--input=hf://{folder / 'set'}")
    prepare(out, given)
    changed = folder / "set/train-1.jsonl"
    changed.write_bytes(changed.read_bytes().replace(b"cat", b"dog"))  # as long as it was
    refused(2, ("is finished, and the input has changed", "hf://"), f"--output={out}", given)


@pytest.mark.parametrize("sizes_known", [True, False])
def test_the_sample_for_the_tokenizer_is_bounded(folder, monkeypatch, sizes_known):
    if not sizes_known:
        monkeypatch.setattr(hub, "sizes", lambda path: [0, 0, 0])
    seen = []
    monkeypatch.setattr(
        own_tokenizer,
        "make_tokenizer",
        lambda spec, given, characters: train_bpe(seen.extend(given()) or list(seen), 280),
    )
    prepare(
        folder / "out",
        f"--input=hf://{folder / 'set'}",
        "--tokenizer=bpe:280",
        "--tokenizer_mb=0.003",
        "--piece_mb=0.004",
    )

    assert 2000 < sum(len(text.encode()) for text in seen) <= 3000
    assert {text.split(".")[0] for text in seen} == {"0", "1", "2"}  # of every shard


class Hub:
    """A hub with one set, whose newest commit is `head`. It keeps what was asked of it."""

    def __init__(self, monkeypatch, folder):
        self.head = HEAD
        self.asked = []
        self.folder = folder
        monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", self.info)
        monkeypatch.setattr("datasets.load_dataset", self.load)
        monkeypatch.setattr("datasets.load_dataset_builder", self.builder)
        self.load_dataset = load_dataset
        hub._stream.cache_clear(), hub._sizes.cache_clear()

    def info(self, *_, revision=None, files_metadata=False, **__):
        files = [SimpleNamespace(rfilename=f"train-{i}.jsonl", size=5000 + i) for i in range(3)]
        return SimpleNamespace(
            sha=self.head if revision in (None, "main") else revision, siblings=files
        )

    def load(self, name, config, *, split, revision, streaming):
        self.asked.append(revision)
        return self.load_dataset(str(self.folder / "set"), config, split=split, streaming=streaming)

    def builder(self, name, config, *, revision):
        files = [f"hf://datasets/{name}@{revision}/train-{i}.jsonl" for i in range(3)]
        return SimpleNamespace(config=SimpleNamespace(data_files={"train": files}))


load_dataset = datasets.load_dataset


def test_a_set_of_the_hub_is_held_to_its_commit(folder, monkeypatch, capsys):
    """Every reading asks for the commit of the first call, although the hub has a newer one."""
    there = Hub(monkeypatch, folder)
    run = units.tokenize
    made = []

    def stopping(job, unit, tick, **more):
        made.append(unit.name)
        if len(made) == 2:
            raise OSError(5, "gone")
        return run(job, unit, tick, **more)

    assert hub.sizes(f"hf://org/set#{HEAD}") == [5000, 5001, 5002]
    monkeypatch.setattr(units, "tokenize", stopping)
    given = ["--input=hf://org/set", "--piece_mb=0.004"]
    refused(2, ("gone",), f"--output={folder / 'out'}", *given)
    there.head = NEXT
    out = prepare(folder / "out", *given)
    assert set(there.asked) == {HEAD} and len(there.asked) == 1  # and once in a process
    assert made == ["text-00000", "text-00001", "text-00001", "text-00002"]
    assert documents(out)["text"]["train"] == ALL
    assert json.loads((out / "corpus.json").read_bytes())["settings"]["revisions"] == {
        "hf://org/set": HEAD
    }
    assert f"revision {HEAD}, as before" in capsys.readouterr().err
    prepare(out, *given)
    assert "is finished already" in capsys.readouterr().err
    prepare(folder / "fresh", *given)
    assert set(there.asked) == {HEAD, NEXT}


def test_a_revision_can_be_named(folder, monkeypatch):
    there = Hub(monkeypatch, folder)
    prepare(folder / "out", f"--input=hf://org/set#{NEXT}")
    assert set(there.asked) == {NEXT}
    refused(
        2,
        ("the revision of --input was", HEAD, NEXT),
        f"--output={folder / 'out'}",
        "--input=hf://org/set#main",
    )


def test_a_hub_that_does_not_answer_is_said(folder, monkeypatch, capsys):
    there = Hub(monkeypatch, folder)

    def silent(*_, **__):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", silent)
    runs.call("prepare", "--input=hf://org/set", "--workers=1", f"--output={folder / 'out'}")
    assert "hf://org/set: no route to the hub" in capsys.readouterr().err and set(there.asked) == {
        None
    }
