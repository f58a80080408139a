"""When checkpoints are saved, and which of them are kept."""

import os

import numpy as np
import pytest
from small_checkpoints import cut, save_all, small

from gpt_jax import config
from gpt_jax.train.checkpoint import checkpoints, manifest
from gpt_jax.train.checkpoint.policy import to_keep


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
