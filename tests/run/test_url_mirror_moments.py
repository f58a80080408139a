"""Threads and processes of a mirror that meet at one moment, and what a start leaves as it is."""

import json
import threading
import time

import pytest
import stores
from stores import quick  # noqa: F401 (a fixture)
from test_url_mirror import begun, save

from gpt_jax.run import fetch, lease, mirror as mirrors
from gpt_jax.run.store import Store
from gpt_jax.train.checkpoint import checkpoints

pytestmark = pytest.mark.usefixtures("quick")


def test_a_lease_that_is_being_renewed_is_given_back_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(mirrors, "RENEW_SECONDS", 0.01)
    mirror = begun(tmp_path)
    is_under_way = threading.Event()
    write = lease.Lease._write

    def write_late(own, moment):
        if moment != lease.ENDED:
            is_under_way.set()
            time.sleep(0.3)
        write(own, moment)

    monkeypatch.setattr(lease.Lease, "_write", write_late)
    assert is_under_way.wait(60)
    mirror.end(None)
    time.sleep(0.4)
    assert json.loads(stores.read("lease.json"))["time"] == lease.ENDED


def test_exports_are_sent_once_and_a_checkpoint_waits_for_its_own(tmp_path, monkeypatch):
    """A kill left step 10 not exported. The same machine goes on from step 20."""
    policy = {"keep_last": 9, "export": "hf", "export_every_steps": 10}
    mirror = begun(tmp_path, **policy)
    monkeypatch.setattr(checkpoints.Checkpoints, "_discard", lambda self, folder: None)
    save(mirror, [5, 10, 20])
    (mirror.folder / "hf/20").mkdir(parents=True)
    (mirror.folder / "hf/20/model").write_text("large")
    mirror.end(None)

    sent = []
    send = Store.send
    monkeypatch.setattr(Store, "send", lambda *given: [sent.append(given[2]), send(*given)])
    again = begun(tmp_path, **policy)
    assert sorted(path.name for path in (again.folder / "checkpoints").iterdir()) == ["10", "20"]
    (again.folder / "hf/30").mkdir()
    (again.folder / "hf/30/model").write_text("large")
    again.end(None)
    assert sent == ["hf/30/model"] and "hf/20/model" in stores.listed()


def test_a_step_that_process_0_alone_has_seen_is_read(tmp_path, monkeypatch):
    """It was saved after this process had looked."""
    mirror = begun(tmp_path)
    save(mirror, [10])

    def agree(decide):
        if stores.sealed() == [10]:
            save(mirror, [20])
        return 20

    monkeypatch.setattr(fetch, "agree_on", agree)
    reader = str(tmp_path / "reader")
    assert fetch.find_checkpoint(stores.URL, 0, lambda line: None, reader)[1] == 20
