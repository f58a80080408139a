"""`gpt-jax convert --to` a URL: what a folder would hold, and its sign of wholeness last."""

import fsspec
import pytest
import runs
import stores
from drawn_models import assert_same, make_origin, read_all

from gpt_jax.errors import SaveFailed
from gpt_jax.interop import write_directory
from gpt_jax.run import store
from gpt_jax.run.convert import open_model

URL = "memory:///bucket/models/a"
SEALS = {"native": "manifest.json", "hf": "config.json"}


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A directory of Hugging Face, and an empty store."""
    monkeypatch.setattr(store, "WAITS", (0.01,))
    stores.empty()
    write_directory(make_origin(), tmp_path / "model")
    yield tmp_path / "model"
    stores.empty()


def convert(source, target, folder, *more) -> tuple:
    return ("convert", "--from", source, f"--to={target}", f"--mirror={folder / 'mirror'}", *more)


def test_a_checkpoint_at_a_url_is_that_of_a_folder(model, tmp_path, monkeypatch):
    sent = []
    send = store.Store.send
    monkeypatch.setattr(
        store.Store, "send", lambda self, *given: (sent.append(given[1]), send(self, *given))
    )
    runs.call(*convert(model, URL, tmp_path, "--tokenizer=bytes"))
    assert sent[-1].endswith(SEALS["native"])
    assert not [*(tmp_path / "mirror/sent").glob("*")]
    there = open_model(URL, 0, print, mirror=str(tmp_path / "mirror"))
    assert_same(read_all(there), read_all(make_origin()))

    # And back, into another place of the store.
    runs.call(*convert(URL, f"{URL}-hf", tmp_path))
    assert sent[-1] == SEALS["hf"]
    files = fsspec.filesystem("memory")
    weights = files.cat_file("/bucket/models/a-hf/model.safetensors")
    assert weights == (model / "model.safetensors").read_bytes()

    code, line = runs.refusal(*convert(model, URL, tmp_path))
    assert code == 2 and line == f"--to={URL}: is there already; name a new folder"


def test_a_store_that_takes_nothing_leaves_the_model_here(model, tmp_path, monkeypatch):
    def refuse(self, source, name):
        raise SaveFailed(f"{self.url}/{name}: away")

    monkeypatch.setattr(store.Store, "send", refuse)
    code, line = runs.refusal(*convert(model, URL, tmp_path, "--format=hf"))
    assert code == SaveFailed.code and line.startswith(f"--to={URL}: could not be sent")
    (whole,) = (tmp_path / "mirror/sent").rglob("config.json")
    assert str(whole.parent) in line and (whole.parent / "model.safetensors").is_file()


def test_a_model_that_cannot_be_written_leaves_nothing_in_the_store(model, tmp_path):
    code, line = runs.refusal(*convert(model, URL, tmp_path, "--format=hf", "--family=none"))
    assert code == 2 and "none" in line
    assert fsspec.filesystem("memory").find("/bucket") == []
