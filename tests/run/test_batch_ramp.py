"""Runs whose batch size changes, as the config plans it or where they resume."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
import runs

from gpt_jax import config as configs
from gpt_jax.errors import NoCheckpoint, UsageError
from gpt_jax.run import loop
from gpt_jax.run.branch import open_branch
from gpt_jax.run.meta import META_SCHEMA, read_past_sizes
from gpt_jax.run.source import find_source
from gpt_jax.schema import find_misfit
from gpt_jax.train import make_schedule, read_meta, resolve_checkpoint

# Rows of 32 tokens: 8 rows in steps 1 to 3, 16 in 4 to 6, and 24 from step 7 on.
RAMP = "--config.train.batch_ramp=((600,16,2),(2000,24,1),(9000,32,1))"
FLAGS = (
    "--config.eval.evaluators=",
    "--config.optim.decay_steps=9",
    "--config.checkpoint.keep_last=9",
    "--config.checkpoint.every_steps=1",
)
RAMP_ROWS = [8, 8, 8, 16, 16, 16, 24, 24, 24]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("batch_ramp")


def load(folder, *flags):
    return runs.load(folder, *FLAGS, *flags)


def build(folder, *flags, **mesh):
    return runs.build(load(folder, *flags), **mesh)


def run(parts, workdir):
    """Runs in this process and returns what was said."""
    lines = []
    runs.run(parts, workdir, lines.append)
    return lines


@pytest.fixture(scope="module")
def ramp(folder):
    """The parts of a run with a ramp, whose programs are compiled once for all tests."""
    return build(folder, RAMP, "--config.train.steps=9")


@pytest.fixture(scope="module")
def whole(folder, ramp):
    """The workdir of that run, which was never stopped, and its lines."""
    return folder / "whole", run(ramp, folder / "whole")


@pytest.fixture(scope="module")
def plain(folder):
    """The workdir of a run of three steps of 8 rows."""
    run(build(folder, "--config.train.steps=3"), folder / "plain")
    return folder / "plain"


class Killed(Exception):
    """The run ends here, as if it had been killed."""


@pytest.fixture
def batches(monkeypatch):
    """The tokens of every batch that runs of this process take, and when one is killed."""
    taken = Taken()
    make = loop.make_ramp_stream

    class Watched:
        def __init__(self, stream):
            self.stream = stream

        def __next__(self):
            if len(taken) == taken.killed_after:
                taken.killed_after = None
                raise Killed
            columns = next(self.stream)
            taken.append(columns["tokens"])
            return columns

        def __getattr__(self, name):
            return getattr(self.stream, name)

    monkeypatch.setattr(loop, "make_ramp_stream", lambda *given: Watched(make(*given)))
    return taken


class Taken(list):
    """Batches; `killed_after` so many the run ends."""

    killed_after = None


def tokens_of(parts, count):
    """The tokens of the first examples, without any batch."""
    return parts.examples.columns(np.arange(count))["tokens"]


def test_each_size_is_told_at_the_start(whole):
    _, lines = whole
    told = next(i for i, line in enumerate(lines) if line.startswith("tokens: "))
    assert "4,608 in all" in lines[told] and "schedule" in lines[told] and "by steps" in lines[told]
    assert [line.strip() for line in lines[told + 1 : told + 5]] == [
        "steps 1 to 3: 8 rows, 256 tokens a step in 1 microbatch",
        "steps 4 to 6: 16 rows, 512 tokens a step in 2 microbatches",
        "steps 7 to 9: 24 rows, 768 tokens a step in 1 microbatch",
        "32 rows from token 9,216 on: never reached, because the run ends at token 4,608",
    ]


def test_tokens_and_the_learning_rate_are_logged_as_they_are(ramp, whole):
    workdir, _ = whole
    wanted = dict(enumerate((32 * np.cumsum(RAMP_ROWS)).tolist(), 1))
    assert runs.curve(workdir, "throughput/tokens_seen") == wanted
    rates = runs.curve(workdir, "train/learning_rate")
    schedule = make_schedule(ramp.config.optim)
    assert rates == pytest.approx({n: 1e-2 * float(schedule(n - 1)) for n in rates})
    # A step that compiles, and the one that would be measured across it, have no rate.
    assert set(runs.curve(workdir, "throughput/tokens_per_second")) == {2, 3, 5, 6, 8, 9}


@pytest.mark.parametrize("stop", [3, 5])
def test_killed_and_resumed_to_the_bit(ramp, whole, tmp_path, batches, stop):
    """It is killed where the size changes, and within a size."""
    batches.killed_after = stop
    with pytest.raises(Killed):
        run(ramp, tmp_path)
    lines = run(ramp, tmp_path)
    assert any(line.startswith("resumed from step ") for line in lines)
    assert not any("goes on at example" in line for line in lines)
    for key in ("train/loss", "train/grad_norm", "throughput/tokens_seen"):
        assert runs.curve(tmp_path, key) == runs.curve(whole[0], key)
    step, arrays = runs.final_state(ramp, whole[0])
    assert step == 9 and not runs.differing(arrays, runs.final_state(ramp, tmp_path)[1])


@pytest.mark.deep
def test_meshes_and_microbatches_change_no_loss(folder, whole, tmp_path):
    other = "--config.train.batch_ramp=((600,16,1),(2000,24,3),(9000,32,1))"
    run(build(folder, other, "--config.train.steps=5", data=2, fsdp=2), tmp_path)
    got = runs.curve(tmp_path)
    wanted = runs.curve(whole[0])
    assert list(got) == [1, 2, 3, 4, 5]
    np.testing.assert_allclose([*got.values()], [wanted[step] for step in got], rtol=1e-5)


def test_a_resume_with_another_batch_size_is_a_ramp(folder, plain, whole, tmp_path):
    """The same sizes, planned or by hand at step 3, are the same run to the bit."""
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    sizes = "--config.train.batch_size=16", "--config.train.accumulate=2"
    lines = run(build(folder, *sizes, "--config.train.steps=6"), tmp_path)
    told = lines.index(
        "step 4 goes on at example 24, with 16 rows and 512 tokens a step, after 8 rows and 256 "
        "tokens; no example is repeated or left out"
    )
    assert lines[told + 1] == (
        "the learning-rate schedule goes by steps: at step 6 the run has read 2,304 tokens, and "
        "with the batch sizes of before 1,536"
    )
    wanted = runs.curve(whole[0])
    assert runs.curve(tmp_path) == {step: wanted[step] for step in range(1, 7)}


def test_every_example_is_seen_once(folder, plain, tmp_path, batches, capsys):
    """Steps 1 to 3 have 8 rows and 4 to 6 have 12. Then a branch goes back to step 2."""
    workdir = tmp_path / "run"
    shutil.copytree(plain, workdir)
    parts = build(folder, "--config.train.batch_size=12", "--config.train.steps=6")
    batches.killed_after = 2
    with pytest.raises(Killed):
        run(parts, workdir)
    saved = read_meta(*resolve_checkpoint(workdir))["step"]
    lines = run(parts, workdir)
    # The history is in the checkpoint, so nothing has changed for the second start.
    assert not any("goes on at example" in line for line in lines)

    # What was lost by the kill is read again, and nothing else is.
    kept = batches[: saved - 3] + batches[2:]
    assert [len(batch) for batch in kept] == [12, 12, 12]
    assert np.array_equal(np.concatenate(kept), tokens_of(parts, 60)[24:])
    rows = [8, 8, 8, 12, 12, 12]
    wanted = dict(enumerate((32 * np.cumsum(rows)).tolist(), 1))
    assert runs.curve(workdir, "throughput/tokens_seen") == wanted
    assert read_meta(*resolve_checkpoint(workdir))["data"]["batch_sizes"] == [[0, 8], [3, 12]]

    capsys.readouterr()
    for step in range(1, 7):
        runs.call("inspect", f"--workdir={workdir}", f"--batch={step}", "--json")
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["example"] for row in shown] == list(range(60))
    assert [row["row"] for row in shown] == [*range(8)] * 3 + [*range(12)] * 3
    runs.call("inspect", f"--workdir={workdir}", "--lineage")
    assert "step 6, 1,920 tokens" in capsys.readouterr().out
    assert find_source(configs.Init(from_=str(workdir)), print).lineage[-1]["tokens"] == 1920

    batches.clear()
    with jax.set_mesh(parts.mesh):
        open_branch(workdir, tmp_path / "branch", 2, print)
    run(parts, tmp_path / "branch")
    assert np.array_equal(np.concatenate(batches), tokens_of(parts, 64)[16:])
    meta = read_meta(*resolve_checkpoint(tmp_path / "branch"))
    assert meta["data"]["batch_sizes"] == [[0, 8], [2, 12]]


def test_what_does_nothing_or_cannot_be_is_refused(folder, whole):
    command = runs.arguments(folder, whole[0], *FLAGS, RAMP, "--config.train.steps=10")
    for flags, words in (
        (
            ["--config.train.batch_size=40"],
            [
                "config.train.batch_size = 40: does nothing at token 4,608",
                "config.train.batch_ramp[1] = (2000, 24, 1)",
                "leave this as it was (8)",
                '--config.train.batch_ramp="((9000,32,1),)"',
            ],
        ),
        (
            ["--config.train.seq_len=64"],
            ["config.train.seq_len (32 there, 64 now)", "config.init.from"],
        ),
        (
            ["--config.train.batch_ramp=((600,16,3),)"],
            ["config.train.batch_ramp[0] = (600, 16, 3)", "the entry's accumulate = 3"],
        ),
        (
            ["--config.train.batch_ramp=((600,8000000,1),)"],
            ["batch_size of config.train.batch_ramp[0] = 8000000: ", "more text"],
        ),
    ):
        code, message = runs.refusal(*command, *flags)
        assert code == 2 and all(word in message for word in words), message


def test_an_evaluation_of_other_text_is_told():
    old = configs.Config(eval=configs.Eval(batches=2, batch_size=8))
    new = configs.Config(eval=configs.Eval(batches=2, batch_size=16))
    past = configs.make_batch_sizes(old.train)
    (line,) = runs.resume.describe_sizes(old, new, past, 3)
    assert "config.eval.batch_size=8 keeps its curve comparable" in line
    assert runs.resume.describe_sizes(old, old, past, 3) == []
    slide = configs.Config(eval=configs.Eval(batches=2, batch_size=8, stride=64))
    (line,) = runs.resume.describe_sizes(old, slide, past, 3)
    assert "config.eval.stride=0 keeps the curve comparable" in line


def test_a_checkpoint_of_before_has_one_batch_size(folder, whole):
    meta = read_meta(*resolve_checkpoint(whole[0]))
    assert meta["data"]["batch_sizes"] == [[0, 8], [3, 16], [6, 24]]
    del meta["data"]["batch_sizes"]
    assert not find_misfit(meta, META_SCHEMA)
    assert read_past_sizes(meta, load(folder), whole[0]).examples(9) == 72
    for pairs in ([[1, 8]], []):
        meta["data"]["batch_sizes"] = pairs
        with pytest.raises(
            NoCheckpoint, match=r"checkpoint step 9 in .*: its position cannot be used"
        ):
            read_past_sizes(meta, load(folder), whole[0])


def test_a_larger_batch_on_more_devices(folder, tmp_path):
    """Batches of before would not divide over the mesh, and are not asked for."""
    run(build(folder, "--config.train.batch_size=2", "--config.train.steps=2", data=2), tmp_path)
    run(build(folder, "--config.train.batch_size=4", "--config.train.steps=4", data=4), tmp_path)
    assert runs.curve(tmp_path, "throughput/tokens_seen") == {1: 64, 2: 128, 3: 256, 4: 384}


def test_a_ramp_that_is_past_its_first_size_moves_to_a_larger_mesh(folder, tmp_path):
    """The sizes are 2, 2 and 8. The refusal names a way out that is one."""
    ramp = "--config.train.batch_ramp=((100,8,1),(9000,16,1))"
    run(
        build(folder, ramp, "--config.train.batch_size=2", "--config.train.steps=3", data=2),
        tmp_path,
    )
    steps = "--config.train.steps=4"
    with pytest.raises(UsageError, match=r"does nothing .*\.batch_ramp=\"\(\(9000,16,1\),\)\""):
        run(build(folder, ramp, steps, "--config.train.batch_size=4", data=4), tmp_path)

    left = "--config.train.batch_ramp=((9000,16,1),)"
    lines = run(build(folder, left, steps, "--config.train.batch_size=8", data=4), tmp_path)
    assert not any("goes on at example" in line or "schedule goes by" in line for line in lines)
    assert runs.curve(tmp_path, "throughput/tokens_seen") == {1: 64, 2: 128, 3: 384, 4: 640}


def test_a_size_that_never_counts_is_refused_though_the_ramp_changes():
    old = configs.Train(seq_len=32, batch_size=8, batch_ramp=((600, 16, 1),))
    new = replace(old, batch_size=40, batch_ramp=((600, 16, 1), (9000, 64, 1)))
    assert "batch_size = 40: does nothing" in runs.resume.check_batch_size(new, old, 100)
    assert not runs.resume.check_batch_size(new, old, 10)
    assert not runs.resume.check_batch_size(replace(new, batch_ramp=()), old, 100)


def test_the_sizes_of_a_resume_are_those_that_the_run_had():
    """Three steps had 8 rows, and the fourth was to have 16."""
    old = configs.Config(train=configs.Train(seq_len=32, steps=9, batch_ramp=((600, 16, 1),)))
    old = replace(old, train=replace(old.train, batch_size=8))
    past = configs.make_batch_sizes(old.train)

    def describe(ramp, steps=9):
        new = replace(old, train=replace(old.train, batch_ramp=ramp, steps=steps))
        return runs.resume.describe_sizes(old, new, past, 3)

    step, total = describe(((600, 12, 1),))
    assert "with 12 rows and 384 tokens a step, after 8 rows and 256 tokens" in step
    assert total.endswith("has read 3,072 tokens, and with the batch sizes of before 3,840")
    # The size stays, or changes as it was to. The rest of the run is another one all the same.
    (total,) = describe(())
    assert total.endswith("has read 2,304 tokens, and with the batch sizes of before 3,840")
    step, total = describe(((600, 16, 1), (2000, 24, 1)))
    assert "with 16 rows" in step and "after 8 rows" in step
    assert total.endswith("has read 4,608 tokens, and with the batch sizes of before 3,840")
    # An entry that the run never reaches changes nothing.
    assert describe(((600, 16, 1), (2000, 24, 1)), steps=6) == []
    assert describe(((600, 16, 1),), steps=20) == []


def test_a_size_that_comes_back_is_not_compiled_again(folder, tmp_path):
    """The sizes are 8, 16, 8 and 8. Steps that compile have no rate."""
    ramp = "--config.train.batch_ramp=((200,16,1),(700,8,1))"
    run(
        build(folder, ramp, "--config.train.steps=4", "--config.checkpoint.every_steps=9"), tmp_path
    )
    assert set(runs.curve(tmp_path, "throughput/tokens_per_second")) == {3, 4}
