"""A save that fails or is killed leaves the checkpoints before it untouched."""

import errno
import os
import shutil
import signal
import subprocess

import jax
import jax.numpy as jnp
import pytest
from small_checkpoints import POLICY, child, finish, restored, same, save_all, small

from gpt_jax.errors import SaveFailed
from gpt_jax.train.checkpoint import checkpoints, manifest


def fill(folder, free_bytes):
    with open(folder / "ballast", "wb") as file:
        try:
            while True:
                file.write(b"\0" * 65536)
        except OSError as error:
            assert error.errno == errno.ENOSPC
    with open(folder / "ballast", "r+b") as file:
        file.truncate(max(0, os.path.getsize(folder / "ballast") - free_bytes))


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 4 MiB, or None if mounting is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if (
        os.getuid()
        or not mount
        or subprocess.run(
            [mount, "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True
        ).returncode
    ):
        yield None
        return
    yield folder
    subprocess.run(["umount", folder], check=True)


def check_failed_save(directory, caplog, capfd, saver, fail, cause):
    """`fail()` makes the save of step 20 fail with `cause`.

    Step 10 survives, and step 20 can be saved afterwards.
    """
    with pytest.raises(SaveFailed) as error:
        fail()
    text = str(error.value)
    assert (
        str(directory) in text
        and "step 20" in text
        and cause in text
        and "step 10 is untouched" in text
    )
    assert (
        "\n" not in text
        and error.value.code == 50
        and not caplog.records
        and capfd.readouterr() == ("", "")
    )
    assert sorted(os.listdir(directory)) == ["10"]  # nothing is left of the failed one
    assert checkpoints.latest_valid(directory) == 10 and same(restored(directory, 10), small(10))


def test_a_full_disk(tiny_disk, tmp_path, monkeypatch, caplog, capfd):
    directory = (tiny_disk or tmp_path) / "checkpoints"
    save_all(directory, [10])
    saver = checkpoints.open_checkpoints(directory, POLICY)
    big = {"w": jax.random.normal(jax.random.key(0), (1 << 20,))}  # 4 MiB that do not compress

    def fail():
        if tiny_disk:
            fill(tiny_disk, 1 << 20)
        else:

            def refuse(*arguments):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            monkeypatch.setattr(checkpoints, "write_manifest", refuse)
        saver.save(20, big, {"step": jnp.int32(20)}, {})
        saver.wait()

    check_failed_save(directory, caplog, capfd, saver, fail, "No space left on device")
    monkeypatch.setattr(checkpoints, "write_manifest", manifest.write_manifest)
    if tiny_disk:
        os.remove(tiny_disk / "ballast")
    assert saver.save(20, *small(20), {})  # the failure is not remembered
    saver.close()
    assert checkpoints.latest_valid(directory) == 20 and same(restored(directory, 20), small(20))


@pytest.mark.parametrize("ending", ["wait", "check", "close"])
def test_no_room_for_the_manifest(tmp_path, monkeypatch, caplog, capfd, ending):
    save_all(tmp_path, [10])
    saver = checkpoints.open_checkpoints(tmp_path, POLICY)

    def refuse(path, text):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    def fail():
        monkeypatch.setattr(manifest, "replace_file", refuse)
        saver.save(20, *small(20), {})
        saver._pending[2].exception()  # the background is through
        getattr(saver, ending)()

    check_failed_save(tmp_path, caplog, capfd, saver, fail, os.strerror(errno.EDQUOT))


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    saver = checkpoints.open_checkpoints(tmp_path / "file" / "checkpoints", POLICY)
    with pytest.raises(SaveFailed, match="Not a directory"):
        saver.save(1, *small(1), {})


# where SIGKILL strikes while step 30 is saved, and the step that must be usable afterwards
KILLS = {
    "before anything is written": ("checkpoints.ocp.save_checkpointables_async = die", 20),
    "while Orbax writes": (
        "from orbax.checkpoint.experimental.v1._src.metadata import serialization; "
        "serialization.write = die",
        20,
    ),
    "before the manifest": ("checkpoints.write_manifest = die", 20),
    "within the manifest": (
        "move = os.replace; "
        "os.replace = lambda a, b: die() if str(b).endswith(manifest.MANIFEST) else move(a, b)",
        20,
    ),
    "after the manifest": (
        "checkpoints.write_manifest = lambda folder: (manifest.write_manifest(folder), die())",
        30,
    ),
    "while an old step is deleted": ("checkpoints.shutil.rmtree = die", 30),
}


@pytest.mark.parametrize("where", KILLS)
def test_sigkill_during_a_save(tmp_path, where):
    patch, expected = KILLS[where]
    finish(
        child(
            tmp_path,
            f"""
policy = config.Checkpoint(keep_last=2)
save_all(directory, [10, 20], policy)
def die(*a, **k):
    os.kill(os.getpid(), 9)
{patch}
saver = checkpoints.open_checkpoints(directory, policy)
saver.save(30, *small(30), {{}})
saver.wait()
""",
        ),
        code=-signal.SIGKILL,
    )
    lines = []
    assert checkpoints.latest_valid(tmp_path, lines.append) == expected
    assert bool(lines) == (expected == 20) and all(
        "step 30" in line and "not finished" in line for line in lines
    )
    saver = checkpoints.open_checkpoints(tmp_path, POLICY, lines.append)
    assert saver.latest == expected and sorted(os.listdir(tmp_path)) == sorted(
        map(str, manifest.steps_in(tmp_path))
    )
    assert same(restored(tmp_path, expected), small(expected))
    assert saver.save(30, *small(30), {}) == (expected == 20)
    saver.close()
    assert checkpoints.latest_valid(tmp_path) == 30 and same(restored(tmp_path, 30), small(30))


def test_killed_in_the_first_save_starts_afresh(tmp_path):
    (tmp_path / f"10{manifest.TEMPORARY}").mkdir()
    (tmp_path / f"10{manifest.SAVING}").touch()
    lines = []
    assert checkpoints.latest_valid(tmp_path, lines.append) is None and "step 10" in lines[0]
    assert checkpoints.open_checkpoints(
        tmp_path, POLICY, lines.append
    ).latest is None and not os.listdir(tmp_path)
