"""Checkpoints give back what was saved, to the bit."""

import json
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_checkpoints import POLICY, abstract, cut, files_of, same, save_all, small

from gpt_jax.errors import NoCheckpoint, UsageError
from gpt_jax.train import read_meta, resolve_checkpoint, restore_checkpoint
from gpt_jax.train.checkpoint import checkpoints, manifest


def test_every_kind_of_leaf_and_node_comes_back_to_the_bit(tmp_path):
    odd = np.array([np.nan, -0.0, np.inf, 1e-45], np.float32)
    odd.view(np.uint32)[0] |= 0x1234  # a NaN with a payload
    params = {
        "w": jnp.asarray(odd),
        "h": jnp.asarray(odd).astype(jnp.bfloat16),
        "deep": {"b": jnp.ones((2, 3))},
        "empty": {},
        "a/b.c": jnp.float16(0.1),
    }
    adam = optax.adamw(1e-3).init(params)
    parts = optax.partition(
        {"a": optax.adamw(1e-3), "b": optax.sgd(0.1, momentum=0.9)},
        {"w": "a", "h": "b", "deep": {"b": "a"}, "empty": {}, "a/b.c": "b"},
    ).init(params)
    train = {
        "opt": adam,
        "parts": parts,
        "step": jnp.int32(7),
        "flag": jnp.array([True, False]),
        "none": None,
        "key": jax.random.key_data(jax.random.key(3)),
        "small": jnp.arange(3, dtype=jnp.int8),
        "list": [jnp.ones(2)],
    }
    assert "MaskedNode" in str(jax.tree.structure(parts)) and "ScaleByAdamState" in str(
        jax.tree.structure(adam)
    )
    saver = checkpoints.open_checkpoints(tmp_path, POLICY)
    saver.save(
        7,
        params,
        train,
        {"data": {"index": 2**60}, "tokenizer": '{"é": "我"}', "list": [1, 2.5, None]},
    )
    saver.close()
    out = restore_checkpoint(tmp_path, 7, {"params": abstract(params), "train": abstract(train)})
    assert same(out["params"], params) and same(out["train"], train)
    meta = read_meta(tmp_path, 7)
    assert meta == {
        "data": {"index": 2**60},
        "tokenizer": '{"é": "我"}',
        "list": [1, 2.5, None],
        "step": 7,
        "metrics": {},
        "format": manifest.FORMAT,
    }


@pytest.mark.parametrize(
    "make",
    [lambda: jax.random.key(1), lambda: jnp.zeros((0, 4)), lambda: np.ones(2), lambda: 3, dict],
    ids=["typed key", "no elements", "numpy", "number", "no leaf"],
)
def test_what_would_not_come_back_is_refused_before_anything_is_written(tmp_path, make):
    saver = checkpoints.open_checkpoints(tmp_path, POLICY)
    with pytest.raises(TypeError, match="params" if make is dict else "params a"):
        saver.save(1, {"a": make()}, {"step": jnp.int32(1)}, {})
    saver.close()
    assert not os.listdir(tmp_path)


def test_restoring_params_reads_nothing_of_train(tmp_path):
    save_all(tmp_path, [10])
    for name in files_of(tmp_path / "10" / "train"):
        (tmp_path / "10" / "train" / name).write_bytes(b"not what Orbax wrote")
    out = restore_checkpoint(tmp_path, 10, {"params": abstract(small(10)[0])})
    assert set(out) == {"params"} and same(out["params"], small(10)[0])


def test_donating_after_save_does_not_reach_the_checkpoint(tmp_path, monkeypatch):
    seal = manifest.write_manifest
    monkeypatch.setattr(
        checkpoints, "write_manifest", lambda folder: (time.sleep(0.2), seal(folder))
    )
    saver = checkpoints.open_checkpoints(tmp_path, POLICY)

    def make():
        return {str(i): jax.random.normal(jax.random.key(i), (256, 1024)) for i in range(6)}

    state = make()
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    saver.save(1, state, {"step": jnp.int32(1)}, {})
    assert not (tmp_path / "1" / manifest.MANIFEST).exists()  # still being written
    for _ in range(4):
        state = step(state)
    jax.block_until_ready(state)
    saver.wait()
    out = restore_checkpoint(tmp_path, 1, {"params": abstract(make())})["params"]
    assert same(out, make())
    for _ in range(4):  # and what was restored may be donated in turn
        out = step(out)
    assert all(np.all(np.asarray(x) == -1) for x in out.values())


def test_a_small_array_on_many_devices_compiles_nothing(tmp_path, mesh, caplog):
    everywhere = jax.sharding.NamedSharding(mesh(8), jax.P())
    params, train = small(1)
    params["rows"] = jnp.arange(64.0)  # 8 on each device
    saver = checkpoints.open_checkpoints(tmp_path, POLICY, report=lambda line: None)
    with jax.log_compiles():
        saver.save(1, *jax.device_put((params, train), everywhere), {}, {})
        saver.close()
    assert "Compiling" not in caplog.text
    back = restore_checkpoint(tmp_path, 1, {"params": abstract(params)})
    assert same(back["params"], params)


def test_meta_is_taken_when_save_is_called(tmp_path):
    saver, meta = checkpoints.open_checkpoints(tmp_path, POLICY), {"index": 1}
    saver.save(1, *small(1), meta)
    meta["index"] = 2
    saver.close()
    assert read_meta(tmp_path, 1)["index"] == 1


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda p: {
                "blocks": {
                    "0": {"kernel": jax.ShapeDtypeStruct((4, 4), jnp.float32, sharding=p.sharding)}
                }
            },
            ["params blocks/0/kernel", "float32[3, 4]", "float32[4, 4]"],
        ),
        (
            lambda p: {
                "blocks": {
                    "0": {"kernel": jax.ShapeDtypeStruct((3, 4), jnp.bfloat16, sharding=p.sharding)}
                }
            },
            ["params blocks/0/kernel", "float32[3, 4]", "bfloat16[3, 4]"],
        ),
        (
            lambda p: {"blocks": {"0": {"kernel": p, "bias": p}}},
            ["params blocks/0/bias", "nothing there"],
        ),
        (lambda p: {"blocks": {"1": {"kernel": p}}}, ["params blocks/1/kernel", "nothing there"]),
        (lambda p: {"other": p}, ["params other", "nothing there"]),
    ],
)
def test_another_architecture_is_named(tmp_path, change, words):
    save_all(tmp_path, [10])
    leaf = abstract(small(10)[0])["blocks"]["0"]["kernel"]
    with pytest.raises(UsageError) as error:
        restore_checkpoint(tmp_path, 10, {"params": change(leaf)})
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_a_part_that_the_run_does_not_know_is_named(tmp_path):
    save_all(tmp_path, [10])
    with pytest.raises(
        UsageError, match=r"train mu is bfloat16\[4\] there and nothing in this run"
    ):
        restore_checkpoint(tmp_path, 10, {"train": {"step": abstract(small(10)[1]["step"])}})


@pytest.mark.parametrize(
    "other, way_out",
    [(1, "update the program"), (1 - manifest.FORMAT, "use the program that wrote it")],
)
def test_another_format_is_refused(tmp_path, other, way_out):
    save_all(tmp_path, [10])
    path = tmp_path / "10" / manifest.META
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": manifest.FORMAT + other}))
    with pytest.raises(UsageError, match=way_out):
        read_meta(tmp_path, 10)


def test_the_format_before_is_read(tmp_path):
    save_all(tmp_path, [10])
    path = tmp_path / "10" / manifest.META
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    assert read_meta(tmp_path, 10)["step"] == 10


def test_nothing_there_is_a_fresh_start(tmp_path):
    assert (
        checkpoints.latest_valid(tmp_path / "none") is None
        and checkpoints.latest_valid(tmp_path) is None
    )
    assert checkpoints.open_checkpoints(tmp_path / "none", POLICY).latest is None


def test_a_step_that_is_there_already_is_not_saved_again(tmp_path):
    save_all(tmp_path, [10])
    before = (tmp_path / "10" / manifest.MANIFEST).read_bytes()
    saver = checkpoints.open_checkpoints(tmp_path, POLICY)
    assert (
        not saver.save(10, *small(11), {})
        and (tmp_path / "10" / manifest.MANIFEST).read_bytes() == before
    )
    saver.close()


def test_resolving_what_a_user_typed(tmp_path, monkeypatch):
    run = tmp_path / "runs" / "a"
    save_all(run / "checkpoints", [10, 20])
    at = run / "checkpoints"
    assert [resolve_checkpoint(p) for p in (run, at, str(at / "20"))] == [(at, 20)] * 3
    assert [resolve_checkpoint(p, 10) for p in (run, at, at / "10")] == [(at, 10)] * 3
    for bad, step, words in [
        (run, 15, ["no step 15", "10, 20"]),
        (at / "15", 0, ["no step 15", "10, 20"]),
        (at / "10", 20, ["step 10", "step 20"]),
        (tmp_path / "runs" / "b", 0, ["does not exist", str(run), "10, 20"]),
        (tmp_path / "x" / "y", 0, ["does not exist", str(run), "10, 20"]),
        (at / "10" / "params", 0, ["holds no checkpoints", "10, 20"]),
    ]:
        with pytest.raises(UsageError) as error:
            resolve_checkpoint(bad, step)
        assert all(word in str(error.value) for word in [repr(str(bad)), *words]), str(error.value)
    # A folder above the working folder is somebody else's.
    monkeypatch.chdir(tmp_path / "runs" / "a")
    with pytest.raises(UsageError, match=r"no checkpoints under .* either; give a workdir"):
        resolve_checkpoint(tmp_path / "runs" / "b")
    cut(at / "20" / manifest.META)
    lines = []
    assert resolve_checkpoint(run, report=lines.append) == (at, 10) and "step 20" in lines[0]
    with pytest.raises(NoCheckpoint, match=r"meta.json"):
        resolve_checkpoint(run, 20)
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UsageError, match="nothing finished"):
        resolve_checkpoint(tmp_path / "empty")
