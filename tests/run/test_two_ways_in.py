"""A workdir on this machine that is reached as a folder and as a URL is one workdir."""

import pytest
from stores import quick  # noqa: F401 (a fixture)

import gpt_jax
from gpt_jax import config
from gpt_jax.errors import Busy, UsageError
from gpt_jax.run.lock import only_run
from gpt_jax.run.mirror import opening_workdir
from gpt_jax.run.store import Store

pytestmark = pytest.mark.usefixtures("quick")


def open_url(tmp_path):
    policy = config.Checkpoint(mirror=str(tmp_path / "mirror"))
    return opening_workdir(f"file://{tmp_path}/store", policy, print)


def test_a_run_at_the_url_keeps_the_folder_to_itself(tmp_path):
    with open_url(tmp_path):
        with pytest.raises(Busy, match="another run is training into it"):
            only_run(tmp_path / "store", print).__enter__()
        # From another machine there is no lock to see, and the lease is.
        (tmp_path / "store/.lock").unlink()
        with pytest.raises(Busy, match="by a URL"):
            only_run(tmp_path / "store", print).__enter__()
    with only_run(tmp_path / "store", print):
        pass


def test_a_run_in_the_folder_keeps_the_url_to_itself(tmp_path):
    (tmp_path / "store").mkdir()
    with only_run(tmp_path / "store", print), pytest.raises(Busy, match="file://"):
        open_url(tmp_path).__enter__()
    with open_url(tmp_path):
        pass


def test_a_removed_step_leaves_no_folder(tmp_path):
    store = Store(f"file://{tmp_path}/store", print)
    store.write("checkpoints/10/params/array", b"values")
    store.write("checkpoints/20/params/array", b"values")
    store.remove("checkpoints/10/params/array")
    store.drop_folder("checkpoints/10")
    assert [path.name for path in (tmp_path / "store/checkpoints").iterdir()] == ["20"]
    stores_in_memory = Store("memory://dropped/store", print)
    stores_in_memory.drop_folder("checkpoints/10")


def test_building_reads_no_workdir_at_a_url():
    with pytest.raises(UsageError, match="is a URL, which is not read here"):
        gpt_jax.build({"data": {"path": ("docs",)}}, workdir="memory://here/run")
