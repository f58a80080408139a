"""Checkpoints give back what was saved, to the bit, whatever happened in between."""

import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import forks
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpt_jax import config
from gpt_jax.errors import NoCheckpoint, SaveFailed, UsageError
from gpt_jax.train import read_meta, resolve_checkpoint, restore_checkpoint
from gpt_jax.train.checkpoint import checkpoints, manifest
from gpt_jax.train.checkpoint.policy import to_keep

ROOT = Path(__file__).resolve().parents[2]
POLICY = config.Checkpoint(every_steps=10, keep_last=3)


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def same(a, b) -> bool:
    """Whether structure, dtypes, shapes and bytes are equal.

    A NaN equals itself, and -0 is not 0.
    """

    def bits(leaf):
        array = np.asarray(leaf)
        return str(array.dtype), array.shape, array.tobytes()

    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        bits(x) == bits(y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=False)
    )


def small(step: int):
    """(params, train) that tell their step."""
    return (
        {"blocks": {"0": {"kernel": jnp.arange(12, dtype=jnp.float32).reshape(3, 4) + step}}},
        {"step": jnp.int32(step), "mu": jnp.full((4,), step, jnp.bfloat16)},
    )


def save_all(directory, steps, policy=POLICY, metrics=lambda step: {}):
    saver = checkpoints.open_checkpoints(directory, policy, report=lambda line: None)
    for step in steps:
        assert saver.save(step, *small(step), {"note": f"step {step}"}, metrics(step))
        saver.wait()
    saver.close()


def restored(directory, step):
    out = restore_checkpoint(
        directory, step, dict(zip(("params", "train"), map(abstract, small(step)), strict=False))
    )
    return out["params"], out["train"]


# What is saved comes back


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


# Damage


def files_of(folder):
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


def test_one_flipped_bit_in_any_file_is_found_and_named(tmp_path):
    save_all(tmp_path, [10, 20])
    folder, rng = tmp_path / "20", np.random.default_rng(0)
    names = files_of(folder)
    assert {manifest.MANIFEST, manifest.META, "params/manifest.ocdbt"} < set(names) and len(
        names
    ) > 12
    flipped = 0
    for name in names:
        whole = (folder / name).read_bytes()
        for bit in (
            rng.choice(len(whole) * 8, min(4, len(whole) * 8), replace=False) if whole else []
        ):
            bad = bytearray(whole)
            bad[bit // 8] ^= 1 << bit % 8
            (folder / name).write_bytes(bad)
            lines = []
            assert checkpoints.latest_valid(tmp_path, lines.append) == 10
            assert (
                len(lines) == 1
                and "step 20" in lines[0]
                and f": {name}: content changed" in lines[0]
            )
            flipped += 1
        (folder / name).write_bytes(whole)
    assert (
        flipped > 40 and checkpoints.latest_valid(tmp_path, lines.append) == 20 and len(lines) == 1
    )
    assert same(restored(tmp_path, 10), small(10))


def test_every_bit_of_the_manifest_counts(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / manifest.META).write_text('{"step": 1, "metrics": {}, "format": 3}')
    manifest.write_manifest(tmp_path)
    whole = (tmp_path / manifest.MANIFEST).read_bytes()
    assert manifest.find_damage(tmp_path) == ""
    for bit in range(0, len(whole) * 8, 3):
        bad = bytearray(whole)
        bad[bit // 8] ^= 1 << bit % 8
        (tmp_path / manifest.MANIFEST).write_bytes(bad)
        assert manifest.find_damage(tmp_path) == "manifest.json: content changed"


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def reseal(folder, change):
    """Writes another meta, and the manifest that fits it."""
    meta = json.loads((folder / manifest.META).read_bytes())
    (folder / manifest.META).write_text(change(meta))
    manifest.write_manifest(folder)


DAMAGE = {
    "truncated": (
        lambda f: cut(f / "params" / "manifest.ocdbt"),
        r"params/manifest\.ocdbt: \d+ bytes instead of \d+",
    ),
    "missing": (lambda f: (f / "train" / "_METADATA").unlink(), r"train/_METADATA: missing"),
    "item missing": (
        lambda f: shutil.rmtree(f / "params"),
        r"params/\S+: missing \(and \d+ more files\)",
    ),
    "extra": (
        lambda f: (f / "params" / "d" / "new").write_bytes(b"x"),
        r"params/d/new: not part of the checkpoint",
    ),
    "no manifest": (lambda f: (f / manifest.MANIFEST).unlink(), r"manifest\.json: missing"),
    "empty manifest": (
        lambda f: (f / manifest.MANIFEST).write_text(""),
        r"manifest\.json: content changed",
    ),
    "other manifest": (
        lambda f: (f / manifest.MANIFEST).write_text("[1]"),
        r"manifest\.json: content changed",
    ),
    "nested manifest": (
        lambda f: (f / manifest.MANIFEST).write_text("[" * 200_000),
        r"manifest\.json: content changed",
    ),
    "manifest of another shape": (
        lambda f: (f / manifest.MANIFEST).write_text(manifest.render_manifest({"a": 3})),
        r"manifest\.json: content changed",
    ),
    "sealed meta, nested": (
        lambda f: reseal(f, lambda meta: '{"format":' * 200_000),
        r"meta\.json: nested too deeply",
    ),
    "sealed meta, no format": (
        lambda f: reseal(f, lambda meta: json.dumps({"step": 20})),
        r"meta\.json: format: missing",
    ),
    "sealed meta, metrics as texts": (
        lambda f: reseal(f, lambda meta: json.dumps(meta | {"metrics": {"eval/loss": "low"}})),
        r"meta\.json: metrics\.'eval/loss': expected a number",
    ),
    "empty": (lambda f: (shutil.rmtree(f), f.mkdir()), r"20: empty directory"),
    "directory for a file": (
        lambda f: ((f / manifest.META).unlink(), (f / manifest.META).mkdir()),
        r"meta\.json: missing",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_one_before_is_used(tmp_path, kind):
    save_all(tmp_path, [10, 20])
    hurt, pattern = DAMAGE[kind]
    hurt(tmp_path / "20")
    lines = []
    assert checkpoints.latest_valid(tmp_path, lines.append) == 10
    assert len(lines) == 1 and re.search(rf"step 20 .*: {pattern}", lines[0]), lines
    assert (tmp_path / "20").exists()  # nothing is deleted
    saver = checkpoints.open_checkpoints(tmp_path, POLICY, lines.append)
    assert saver.latest == 10
    assert saver.save(20, *small(20), {})
    saver.close()
    assert (tmp_path / "20.damaged").is_dir() and "20.damaged" in lines[-1]
    assert checkpoints.latest_valid(tmp_path) == 20 and same(restored(tmp_path, 20), small(20))


def test_a_sealed_meta_without_what_the_caller_needs_is_damage(tmp_path):
    wanted = {"note": "text"}
    save_all(tmp_path, [10, 20])
    reseal(tmp_path / "20", lambda meta: json.dumps(meta | {"note": 3}))
    assert checkpoints.latest_valid(tmp_path) == 20
    lines = []
    assert checkpoints.latest_valid(tmp_path, lines.append, meta_schema=wanted) == 10
    assert "meta.json: note: expected a text, got 3" in lines[0]
    assert resolve_checkpoint(tmp_path, 0, lines.append, wanted) == (tmp_path, 10)
    opened = checkpoints.open_checkpoints(tmp_path, POLICY, lines.append, meta_schema=wanted)
    assert opened.latest == 10
    with pytest.raises(NoCheckpoint, match="note: expected a text"):
        read_meta(tmp_path, 20, wanted)

    # Another version's meta may look as it likes, and is told by its number.
    reseal(tmp_path / "20", lambda meta: json.dumps({"format": manifest.FORMAT + 1}))
    assert checkpoints.latest_valid(tmp_path, lines.append, meta_schema=wanted) == 20
    with pytest.raises(UsageError, match="update the program"):
        read_meta(tmp_path, 20, wanted)


def test_nothing_valid_lists_what_was_found(tmp_path):
    save_all(tmp_path, [10, 20])
    for step in (10, 20):
        cut(tmp_path / str(step) / manifest.META)
    for look in (checkpoints.latest_valid, lambda d, r: checkpoints.open_checkpoints(d, POLICY, r)):
        with pytest.raises(NoCheckpoint) as error:
            look(tmp_path, lambda line: None)
        assert "step 10: meta.json" in str(error.value) and "step 20: meta.json" in str(error.value)


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


# Policies


def test_what_is_kept_equals_a_brute_force_list():
    rng = np.random.default_rng(1)
    for _ in range(300):
        steps = sorted({int(s) for s in rng.integers(1, 60, rng.integers(1, 12))})
        values = {
            s: [None, float("nan"), float(rng.integers(0, 4))][min(2, rng.integers(0, 6))]
            for s in steps
        }
        policy = config.Checkpoint(
            keep_last=int(rng.integers(1, 4)),
            keep_best=int(rng.integers(0, 3)),
            keep_every_steps=int(rng.integers(0, 8)),
        )
        expected = set()
        for s in steps:
            newer = sum(other > s for other in steps)
            ranked = values[s] is not None and values[s] == values[s]
            better = sum(
                v is not None
                and v == v
                and ranked
                and (v < values[s] or (v == values[s] and o > s))
                for o, v in values.items()
            )
            if (
                newer < policy.keep_last
                or (policy.keep_every_steps and s % policy.keep_every_steps == 0)
                or (ranked and better < policy.keep_best)
            ):
                expected.add(s)
        assert to_keep(values, policy) == expected


def test_policies_on_disk_across_a_restart(tmp_path):
    policy = config.Checkpoint(keep_last=1, keep_every_steps=30, keep_best=1)
    loss = {10: 1.0, 20: 3.0, 30: 4.0, 40: 2.0, 50: 5.0, 60: 6.0}
    save_all(tmp_path, [10, 20, 30, 40], policy, lambda step: {"eval/loss": loss[step]})
    assert manifest.steps_in(tmp_path) == [10, 30, 40]
    save_all(
        tmp_path, [50, 60], policy, lambda step: {"eval/loss": loss[step]}
    )  # the metrics of before still count
    assert manifest.steps_in(tmp_path) == [10, 30, 60] and sorted(os.listdir(tmp_path)) == [
        "10",
        "30",
        "60",
    ]


def test_damaged_newer_steps_do_not_crowd_out_good_ones(tmp_path):
    save_all(tmp_path, [10, 20])
    cut(tmp_path / "20" / manifest.META)
    saver = checkpoints.open_checkpoints(
        tmp_path, config.Checkpoint(keep_last=2), report=lambda line: None
    )
    saver.save(15, *small(15), {})
    saver.close()
    assert manifest.steps_in(tmp_path) == [10, 15, 20]


def test_the_old_one_stays_until_the_new_one_is_complete(tmp_path, monkeypatch):
    save_all(tmp_path, [10])
    seal, seen = manifest.write_manifest, []

    def look_and_seal(folder):
        seen.append(checkpoints.latest_valid(tmp_path, lambda line: None))
        seal(folder)

    monkeypatch.setattr(checkpoints, "write_manifest", look_and_seal)
    save_all(tmp_path, [20], config.Checkpoint(keep_last=1))
    assert seen == [10] and manifest.steps_in(tmp_path) == [20]


def test_when_to_save(tmp_path, monkeypatch):
    saver = checkpoints.open_checkpoints(tmp_path, config.Checkpoint(every_steps=4))
    assert [step for step in range(13) if saver.should_save(step)] == [4, 8, 12]
    saver.save(8, *small(8), {})
    saver.close()
    assert not saver.should_save(8)
    assert not any(
        checkpoints.open_checkpoints(tmp_path, config.Checkpoint(every_steps=0)).should_save(s)
        for s in range(9, 99)
    )


@pytest.mark.parametrize("seconds_per_step", [0.05, 1.0, 70.0])
def test_every_minutes_on_a_simulated_clock(tmp_path, monkeypatch, seconds_per_step):
    now, asked = [0.0], []
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now[0])
    look = checkpoints.look_at_clock
    monkeypatch.setattr(checkpoints, "look_at_clock", lambda *a: (asked.append(a), look(*a))[1])
    saver = checkpoints.open_checkpoints(
        tmp_path, config.Checkpoint(every_steps=0, every_minutes=1.0)
    )
    monkeypatch.setattr(
        checkpoints.ocp, "save_checkpointables_async", lambda *a: pytest.fail("not needed")
    )
    saves, steps = [], int(600 / seconds_per_step)
    for step in range(1, steps + 1):
        now[0] += seconds_per_step
        if saver.should_save(step):
            saves.append(now[0])
            saver._saved_step, saver._saved_at, saver._next_look = (
                step,
                now[0],
                step + 1,
            )  # what save() does
    gaps = np.diff([0.0, *saves])
    assert len(saves) >= 7 and all(
        gap + 1e-6 >= 60 and gap <= 60 + max(3.1, seconds_per_step) for gap in gaps
    )
    assert len(asked) <= 10 * 60  # few questions although there are many steps


# Failures


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


CHILD = """
import os, sys, threading, time
sys.path[:0] = {folders!r}
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", {devices})
import numpy as np, jax.numpy as jnp
from gpt_jax import config
from gpt_jax.train.checkpoint import checkpoints, manifest
from gpt_jax.train.checkpoint.policy import to_keep
from test_checkpoint import *
directory = {directory!r}
"""


def child(directory, body, devices=1):
    """Runs `body` in a process of its own. It sees the names of this file."""
    head = CHILD.format(
        folders=[str(ROOT / name) for name in ("", "tests/train", "tests/support")],
        devices=devices,
        directory=str(directory),
    )
    return forks.Popen(
        [sys.executable, "-c", head + body],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def finish(*processes, code=0):
    for process in processes:
        output = process.communicate(timeout=120)[0]
        assert process.returncode == code, output[-3000:]


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


# What a user types


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


# Other meshes, other process counts

MESHES = """
def whole(step):
    rng = np.random.default_rng(step)
    w, b = rng.standard_normal((8, 16)), rng.standard_normal(16)
    return {"w": w.astype(np.float32), "b": b.astype(jnp.bfloat16), "n": np.int32(step)}
def place(tree, mesh, specs, make):
    lay = jax.sharding.NamedSharding
    return {k: make(v, lay(mesh, jax.P(*specs[k]))) for k, v in tree.items()}
def concrete(v, s):
    return jax.make_array_from_callback(np.shape(v), s, lambda i: np.asarray(v)[i])
def wanted(v, s):
    return jax.ShapeDtypeStruct(np.shape(v), v.dtype, sharding=s)
def expect(step, mesh, specs):
    params = place(whole(step), mesh, specs, wanted)
    train = place(whole(step + 1), mesh, specs, wanted)
    out = restore_checkpoint(directory, step, {"params": params, "train": train})
    for tree, full in ((out["params"], whole(step)), (out["train"], whole(step + 1))):
        for k, v in full.items():
            lay = jax.sharding.NamedSharding(mesh, jax.P(*specs[k]))
            assert tree[k].sharding == lay, (k, tree[k].sharding)
            for shard in tree[k].addressable_shards:
                ours = np.asarray(shard.data).tobytes()
                assert ours == np.asarray(v)[shard.index].tobytes(), (step, k)
def save(step, mesh, specs):
    with jax.set_mesh(mesh):
        policy = config.Checkpoint(every_minutes=1e-9, every_steps=0)
        saver = checkpoints.open_checkpoints(directory, policy)
        assert saver.should_save(step)
        params = place(whole(step), mesh, specs, concrete)
        saver.save(step, params, place(whole(step + 1), mesh, specs, concrete), {"step": step})
        saver.wait()
        assert manifest.find_damage(Path(directory) / str(step)) == ""
        saver.close()
"""
MESH_8 = """
mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"))
specs = dict(w=("fsdp", "tensor"), b=("tensor",), n=())
"""
MESH_4 = """
mesh = jax.make_mesh((4, 1), ("tensor", "fsdp"))
specs = dict(w=(None, "tensor"), b=(None,), n=())
"""
MESH_1 = 'mesh, specs = jax.make_mesh((1,), ("fsdp",)), dict(w=("fsdp",), b=(None,), n=())\n'
MESH_2X2 = 'mesh, specs = jax.make_mesh((4,), ("fsdp",)), dict(w=("fsdp",), b=("fsdp",), n=())\n'


def test_other_meshes_and_process_counts(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    finish(child(tmp_path, MESHES + MESH_8 + "save(1, mesh, specs)", devices=8))
    both = """
assert checkpoints.latest_valid(directory) == 1
expect(1, mesh, specs)
save(2, mesh, specs)
with jax.set_mesh(mesh):
    assert manifest.resolve_checkpoint(directory) == (Path(directory), 2)
expect(2, mesh, specs)
if jax.process_index() == 0:  # damaged for all processes when process 0 says so
    path = Path(directory) / "2" / manifest.META
    text = path.read_bytes()
    path.write_bytes(text[:-1])
lines = []
assert checkpoints.latest_valid(directory, lines.append) == 1
assert len(lines) == (jax.process_index() == 0)
try:
    manifest.resolve_checkpoint(directory, 2)
    raise AssertionError("no error")
except NoCheckpoint as error:
    assert "meta.json" in str(error)
if jax.process_index() == 0:
    path.write_bytes(text)
    def refuse(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    checkpoints.write_manifest = refuse
saver = checkpoints.open_checkpoints(directory, POLICY, lines.append)
arrays = place(whole(3), mesh, specs, concrete)
assert saver.save(3, arrays, {"n": arrays["n"]}, {})
try:
    saver.wait()  # the failure of process 0 reaches all
    raise AssertionError("no error")
except SaveFailed as error:
    assert "No space left" in str(error) and "step 2 is untouched" in str(error)
"""
    finish(
        *(
            child(
                tmp_path,
                f"jax.distributed.initialize('127.0.0.1:{port}', 2, {rank})\n"
                + MESHES
                + MESH_2X2
                + both,
                devices=2,
            )
            for rank in range(2)
        )
    )
    check = "expect(1, mesh, specs)\nexpect(2, mesh, specs)"
    finish(
        child(tmp_path, MESHES + MESH_1 + check),
        child(tmp_path, MESHES + MESH_4 + check, devices=4),
    )
    assert read_meta(tmp_path, 2)["step"] == 2
