"""A mirror sends finished checkpoints to its store, and a start brings down what it needs."""

import json
import time

import pytest
import stores
from small_checkpoints import POLICY, restored, same, small
from stores import quick  # noqa: F401 (a fixture)

from gpt_jax import config
from gpt_jax.errors import Busy, NoCheckpoint, SaveFailed, UsageError
from gpt_jax.files import digest_file
from gpt_jax.run import fetch, lease, mirror as mirrors
from gpt_jax.run.store import Store
from gpt_jax.train.checkpoint import checkpoints
from gpt_jax.train.checkpoint.manifest import render_manifest

pytestmark = pytest.mark.usefixtures("quick")
META = {"config": {}, "tokenizer": "", "data": {"next": 0, "content": ""}}


def save(mirror, steps, policy=POLICY, metrics=lambda step: {}):
    """Saves the `small` trees of all `steps` through a mirror that has begun."""
    saver = checkpoints.open_checkpoints(
        mirror.folder / "checkpoints", policy, lambda line: None, outlet=mirror
    )
    for step in steps:
        assert saver.save(step, *small(step), META, metrics(step))
        saver.wait()
    saver.close()
    return saver


def begun(folder, said=None, **policy):
    mirror = stores.open_mirror(folder, [] if said is None else said, **policy)
    mirror.begin()
    return mirror


def kill_at(monkeypatch, name):
    """Lets the process die where a file of that name would be sent."""
    send = Store.send

    def send_or_die(self, source, target):
        if target.endswith(name):
            raise SystemExit("killed")
        send(self, source, target)

    monkeypatch.setattr(Store, "send", send_or_die)


def test_what_is_sent_is_what_a_reader_gets(tmp_path):
    mirror = begun(tmp_path)
    save(mirror, [10])
    directory, step = fetch.find_checkpoint(
        stores.URL, 0, lambda line: None, str(tmp_path / "reader"), has_moments=True
    )
    for mine, theirs in zip(small(10), restored(directory, step), strict=True):
        assert same(mine, theirs)
    own = mirror.folder / "checkpoints/10"
    names = [path.relative_to(own) for path in own.rglob("*") if path.is_file()]
    assert [digest_file(own / name) for name in names] == [
        digest_file(directory / "10" / name) for name in names
    ]


def test_a_reader_leaves_the_moments_out(tmp_path):
    save(begun(tmp_path), [10])
    directory, _ = fetch.find_checkpoint(stores.URL, 0, lambda line: None, str(tmp_path / "reader"))
    assert (directory / "10/params").is_dir() and not (directory / "10/train").exists()


@pytest.mark.parametrize("name", ["20/manifest.json", "20/meta.json"])
def test_a_kill_before_the_manifest_leaves_the_older_checkpoint(tmp_path, monkeypatch, name):
    with monkeypatch.context() as dying:
        kill_at(dying, name)
        with pytest.raises(SystemExit):
            save(begun(tmp_path / "a"), [10, 20])
    assert any(file.startswith("checkpoints/20/") for file in stores.listed())
    reader = str(tmp_path / "reader")
    assert fetch.find_checkpoint(stores.URL, 0, lambda line: None, reader)[1] == 10

    # Another machine goes on from there, once the lease has ended.
    stores.write_lease("killed", lease.LEASE_SECONDS)
    said = []
    mirror = begun(tmp_path / "b", said)
    assert any("step 20" in line and "was not finished" in line for line in said)
    assert stores.sealed() == [10] and not stores.listed("checkpoints/20")
    assert save(mirror, []).latest == 10


def test_the_machine_of_a_killed_run_sends_what_it_had(tmp_path, monkeypatch):
    """It does not wait for its own lease, and trains no step twice."""
    with monkeypatch.context() as dying:
        kill_at(dying, "20/manifest.json")
        with pytest.raises(SystemExit):
            save(begun(tmp_path), [10, 20])
    said = []
    assert save(begun(tmp_path, said), []).latest == 20
    assert stores.sealed() == [10, 20]
    assert any("step 20 is sent" in line for line in said)


def test_what_was_not_sent_is_dropped_if_others_were_there(tmp_path, monkeypatch):
    with monkeypatch.context() as dying:
        kill_at(dying, "20/manifest.json")
        with pytest.raises(SystemExit):
            save(begun(tmp_path), [10, 20])
    stores.write_lease("another", lease.LEASE_SECONDS)
    said = []
    assert save(begun(tmp_path, said), []).latest == 10
    assert any("is dropped" in line for line in said)


@pytest.mark.parametrize("age, is_free", [(0, False), (200, False), (301, True)])
def test_a_lease_ends_by_its_age(tmp_path, age, is_free):
    stores.write_lease("another", age)
    if is_free:
        begun(tmp_path).end(None)
        return
    with pytest.raises(Busy, match="process 7 on elsewhere"):
        begun(tmp_path)


def test_a_lease_that_was_given_back_is_free(tmp_path):
    begun(tmp_path / "a").end(None)
    begun(tmp_path / "b").end(None)


def test_of_two_that_write_at_once_the_later_has_the_lease(tmp_path, monkeypatch):
    def other_writes(seconds):
        stores.write_lease("later")

    monkeypatch.setattr(time, "sleep", other_writes)
    with pytest.raises(Busy, match="has taken its lease"):
        begun(tmp_path)


def test_a_run_that_has_lost_its_lease_sends_nothing(tmp_path):
    mirror = begun(tmp_path)
    save(mirror, [10])
    stores.write_lease("another")
    with pytest.raises(Busy):
        save(mirror, [20])
    with pytest.raises(Busy):
        mirror.check()
    before = stores.listed()
    (mirror.folder / "metrics.jsonl").write_text("{}\n")
    mirror.end(None)
    assert stores.listed() == before and stores.sealed() == [10]


def test_a_kill_while_the_lease_is_taken_loses_nothing(tmp_path, monkeypatch):
    with monkeypatch.context() as dying:
        kill_at(dying, "20/manifest.json")
        with pytest.raises(SystemExit):
            save(begun(tmp_path), [10, 20])

    def die(seconds):
        raise SystemExit("killed")

    with monkeypatch.context() as dying:
        dying.setattr(time, "sleep", die)
        with pytest.raises(SystemExit):
            begun(tmp_path)
    assert save(begun(tmp_path), []).latest == 20


def wait_until(is_true):
    end = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def test_between_saves_the_lease_is_renewed_and_metrics_are_sent(tmp_path, monkeypatch):
    monkeypatch.setattr(mirrors, "RENEW_SECONDS", 0.02)
    mirror = begun(tmp_path)
    before = stores.read("lease.json")
    (mirror.folder / "metrics.jsonl").write_text("{}\n")
    wait_until(lambda: "metrics.jsonl" in stores.listed() and stores.read("lease.json") != before)

    stores.write_lease("another")
    with pytest.raises(Busy):
        wait_until(mirror.check)
    mirror.end(None)


def test_retention_counts_what_lies_in_the_store_alone(tmp_path):
    """The second machine has none of the first one's checkpoints but the newest."""
    policy = config.Checkpoint(keep_last=1, keep_every_steps=20, keep_best=1)
    losses = {10: 3.0, 20: 5.0, 30: 4.0, 40: 6.0, 50: 7.0}
    for folder, steps in (("a", [10, 20, 30]), ("b", [40, 50])):
        mirror = begun(tmp_path / folder, keep_last=1, keep_every_steps=20, keep_best=1)
        save(mirror, steps, policy, lambda step: {"eval/loss": losses[step]})
        mirror.end(None)
        # The disk needs to hold the newest alone.
        kept = [path.name for path in (mirror.folder / "checkpoints").iterdir()]
        assert kept == [str(steps[-1])]
    assert stores.sealed() == [10, 20, 40, 50]
    assert not stores.listed("checkpoints/30")


def test_damage_in_the_store_is_passed_over(tmp_path):
    mirror = begun(tmp_path / "a")
    save(mirror, [10, 20])
    mirror.end(None)
    name = next(name for name in stores.listed("checkpoints/20/params") if "/d/" in name)
    stores.flip(name)
    assert dict(fetch.find_remote_damage(stores.URL)) == {
        10: "",
        20: f"{name.removeprefix('checkpoints/20/')}: content changed (sha256 differs)",
    }
    said = []
    found = fetch.find_checkpoint(stores.URL, 0, said.append, str(tmp_path / "reader"))
    assert found[1] == 10 and any("step 20" in line and "damaged" in line for line in said)
    again = begun(tmp_path / "b", said)
    assert save(again, []).latest == 10

    # The run comes to that step once more, and replaces it.
    save(again, [20])
    assert set(dict(fetch.find_remote_damage(stores.URL)).values()) == {""}
    again.end(None)


def test_a_step_that_is_deleted_while_it_is_copied_gives_way_to_a_newer_one(tmp_path, monkeypatch):
    policy = config.Checkpoint(keep_last=1)
    mirror = begun(tmp_path, keep_last=1)
    save(mirror, [10], policy)
    copy = Store.fetch

    def copy_late(self, name, target):
        if "checkpoints/10/" in name and stores.sealed() == [10]:
            mirror.remove(10)
            save(mirror, [20], policy)
        copy(self, name, target)

    monkeypatch.setattr(fetch, "in_threads", lambda work, names: [work(name) for name in names])
    monkeypatch.setattr(Store, "fetch", copy_late)
    said = []
    found = fetch.find_checkpoint(stores.URL, 0, said.append, str(tmp_path / "reader"))
    assert found[1] == 20
    assert any("step 10" in line and "was deleted" in line for line in said)


def test_damage_of_all_is_no_checkpoint(tmp_path):
    mirror = begun(tmp_path / "a")
    save(mirror, [10])
    mirror.end(None)
    stores.flip("checkpoints/10/manifest.json")
    for open_it in (
        lambda: begun(tmp_path / "b"),
        lambda: fetch.find_checkpoint(stores.URL, 0, print, str(tmp_path / "reader")),
    ):
        with pytest.raises(NoCheckpoint, match=r"step 10: manifest\.json: content changed"):
            open_it()


@pytest.mark.parametrize(
    "below, asked, found",
    [
        ("", 0, 20),
        ("", 10, 10),
        ("/checkpoints", 0, 20),
        ("/checkpoints/", 10, 10),
        ("/checkpoints/10", 0, 10),
        ("/checkpoints/10", 20, "is step 10, but step 20 was asked for"),
        ("", 15, "no step 15; steps there: 10, 20"),
        ("/elsewhere", 0, "no checkpoints there"),
    ],
)
def test_urls_name_runs_folders_and_steps(tmp_path, below, asked, found):
    save(begun(tmp_path), [10, 20])
    url = f"{stores.URL}{below}"
    if isinstance(found, str):
        with pytest.raises(UsageError, match=found):
            fetch.find_checkpoint(url, asked, print, str(tmp_path))
    else:
        assert fetch.find_checkpoint(url, asked, print, str(tmp_path))[1] == found
        assert fetch.peek_checkpoint(url, asked, str(tmp_path))[0]["step"] == found


def test_other_files_follow_their_changes(tmp_path):
    mirror = begun(tmp_path / "a")
    (mirror.folder / "deep").mkdir()
    for name in ("metrics.jsonl", "report.html", "deep/trace", ".hidden"):
        (mirror.folder / name).write_text("one")
    mirror.sync()
    (mirror.folder / "metrics.jsonl").write_text("one two")
    (mirror.folder / "report.html").unlink()
    mirror.end(None)
    assert stores.listed() == ["deep/trace", "lease.json", "metrics.jsonl"]

    # A second machine has what resuming reads, and leaves the rest where it is.
    stores.write(".lock", b"")
    other = begun(tmp_path / "b")
    assert (other.folder / "metrics.jsonl").read_text() == "one two"
    other.end(None)
    assert stores.listed() == [".lock", "deep/trace", "lease.json", "metrics.jsonl"]


def test_a_start_that_was_cut_short_is_not_taken_for_whole(tmp_path, monkeypatch):
    mirror = begun(tmp_path / "a")
    (mirror.folder / "metrics.jsonl").write_text("one")
    mirror.end(None)

    def die(self, name, target):
        raise SystemExit("killed")

    with monkeypatch.context() as dying:
        dying.setattr(Store, "fetch", die)
        with pytest.raises(SystemExit):
            begun(tmp_path / "b")
    mine = json.loads(stores.read("lease.json"))
    stores.write_lease(mine["token"], lease.LEASE_SECONDS)
    other = begun(tmp_path / "b")
    assert (other.folder / "metrics.jsonl").read_text() == "one"
    other.end(None)


def test_a_store_that_is_away_for_a_moment_is_asked_again(tmp_path, monkeypatch):
    said = []
    mirror = begun(tmp_path, said)
    put = type(mirror._store._files).put_file
    failures = iter([OSError("away"), TimeoutError("slow")])

    def put_or_fail(self, *given, **more):
        for error in failures:
            raise error
        put(self, *given, **more)

    monkeypatch.setattr(type(mirror._store._files), "put_file", put_or_fail)
    save(mirror, [10])
    assert stores.sealed() == [10]
    assert sum("trying again" in line for line in said) == 2


def test_what_no_further_try_changes_is_told_at_once(tmp_path, monkeypatch):
    mirror = begun(tmp_path)
    calls = []

    def refuse(*given, **more):
        calls.append(given)
        raise PermissionError("denied")

    monkeypatch.setattr(type(mirror._store._files), "put_file", refuse)
    with pytest.raises(UsageError, match="denied"):
        mirror._store.send(tmp_path / "x", "x")
    assert len(calls) == 1
    with pytest.raises(SaveFailed, match="denied"):
        save(mirror, [10])


def test_a_manifest_that_leads_out_of_its_folder_is_damage(tmp_path):
    save(begun(tmp_path), [10])
    stores.write("outside", b"")
    text = render_manifest({"../../outside": [0, "0" * 64]})
    stores.write("checkpoints/10/manifest.json", text.encode())
    with pytest.raises(NoCheckpoint, match="content changed"):
        fetch.find_checkpoint(stores.URL, 0, print, str(tmp_path / "reader"))


def test_other_files_count_as_progress(tmp_path):
    """An export may take longer to send than a run may stand still."""
    mirror = begun(tmp_path)
    mirror.sync()
    before = mirror.progress()
    (mirror.folder / "hf/2").mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (mirror.folder / "hf/2" / name).write_bytes(b"{}")
    mirror.sync()
    assert mirror.progress() == before + 2
    mirror.sync()
    assert mirror.progress() == before + 2
