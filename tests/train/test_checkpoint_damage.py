"""Damage to a checkpoint is found and named, and the one before is used."""

import json
import re
import shutil

import numpy as np
import pytest
from small_checkpoints import POLICY, cut, files_of, restored, same, save_all, small

from gpt_jax.errors import NoCheckpoint, UsageError
from gpt_jax.train import read_meta, resolve_checkpoint
from gpt_jax.train.checkpoint import checkpoints, manifest


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
