"""Files that are whole or absent, and locks that touch nothing else."""

import contextlib
import fcntl

import pytest

from gpt_jax.data.prepare import output
from gpt_jax.data.tokens import store
from gpt_jax.errors import UsageError
from gpt_jax.files import LinkedLock, describe_error, hold_lock, opening_lock
from gpt_jax.run.lock import only_run


def hold_run(folder):
    return only_run(folder, print)


def hold_cache(folder):
    return hold_lock(folder / "key.lock", None)


@contextlib.contextmanager
def hold_output(folder):
    with output.explain_errors(folder), output.hold_lock(folder):
        yield


LOCKS = {
    "run": (hold_run, ".lock", UsageError),
    "prepare": (hold_output, "work/lock", UsageError),
    "cache": (hold_cache, "key.lock", LinkedLock),  # tokens/cache.py names the field
}


@pytest.mark.parametrize("kind", LOCKS)
def test_a_lock_empties_nothing_and_follows_no_link(tmp_path, kind):
    hold, name, error = LOCKS[kind]
    lock = tmp_path / name
    lock.parent.mkdir(exist_ok=True)
    lock.write_text("mine")
    with hold(tmp_path), opening_lock(lock) as second, pytest.raises(BlockingIOError):
        fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert lock.read_text() == "mine"

    victim = tmp_path / "victim"
    victim.write_text("precious")
    lock.unlink()
    lock.symlink_to(victim)
    with pytest.raises(error, match="is a symbolic link and no lock"), hold(tmp_path):
        pass
    assert victim.read_text() == "precious"

    victim.unlink()
    with pytest.raises(error, match="is a symbolic link and no lock"), hold(tmp_path):
        pass
    assert not victim.exists()


def test_a_cache_is_not_built_into_the_target_of_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/mine").touch()
    (tmp_path / "key.building").symlink_to(tmp_path / "elsewhere")

    def build(folder):
        assert not folder.is_symlink()
        raise UsageError("enough")

    with pytest.raises(UsageError, match="enough"):
        store.load_or_build(tmp_path / "key", build, print)
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["mine"]


def test_every_error_has_words():
    """Libraries raise OSErrors without a number, over several lines, or without any words."""
    assert describe_error(OSError(28, "No space left on device")) == "No space left on device"
    assert describe_error(OSError("torn\n  stream")) == "torn stream"
    assert describe_error(OSError()) == "OSError"
