"""Arrays that are written a slice at a time are read back to the bit, whatever their chunks."""

import numpy as np
import pytest

from gpt_jax.train.checkpoint import slices
from gpt_jax.train.checkpoint.slices import Lazy, choose_chunk, read_slice, write_slices

META = {"config": {}, "data": {}}


@pytest.mark.parametrize("most", [1 << 30, 100])
def test_slices_come_back(tmp_path, monkeypatch, most):
    """Chunks of 100 bytes cut each slice. Numbers of 16 bits and of 32 come back alike."""
    monkeypatch.setattr(slices, "CHUNK_BYTES", most)
    rng = np.random.default_rng(0)
    whole = {
        "blocks/0/kernel": rng.standard_normal((3, 7, 11)).astype(np.float32),
        "embed/table": rng.standard_normal((40, 6)).astype(np.float16).astype(np.float32),
        "scale": np.array([np.inf, -0.0, 1e-40], np.float32),
    }
    depths = {"blocks/0/kernel": 1}

    def lazy(path):
        return Lazy(whole[path].shape, depths.get(path, 0), lambda index: whole[path][index])

    write_slices(tmp_path, 0, {path: lazy(path) for path in whole}, META, {}, lambda: None)
    for path, values in whole.items():
        found = read_slice(tmp_path / "0", "params", path, (slice(None),) * values.ndim)
        assert found.tobytes() == values.tobytes()


def test_chunks_are_slices_of_limited_size(monkeypatch):
    monkeypatch.setattr(slices, "CHUNK_BYTES", 4 * 100)
    assert choose_chunk((5, 10, 10), 1) == [1, 10, 10]
    assert choose_chunk((5, 21, 10), 1) == [1, 7, 10]
    assert choose_chunk((3, 450), 0) == [1, 90]
    assert choose_chunk((), 0) == []


def test_one_slice_is_read_while_another_is_written(tmp_path):
    """No more than two slices are alive at a time."""
    alive = set()
    most = []

    class Tracked(np.ndarray):
        def __del__(self):
            alive.discard(id(self))

    def read(index):
        values = np.zeros((1, 8), np.float32).view(Tracked)
        alive.add(id(values))
        most.append(len(alive))
        return values

    write_slices(tmp_path, 0, {"kernel": Lazy((6, 8), 1, read)}, META, {}, lambda: None)
    assert len(most) == 6 and max(most) <= 2
