"""Runs whose rows are shorter at first."""

import json
import shutil

import jax
import numpy as np
import pytest
import runs

from gpt_jax import config as configs
from gpt_jax.errors import NoCheckpoint, UsageError
from gpt_jax.model.attention.kernels import choose_kernel, make_problem
from gpt_jax.run import loop
from gpt_jax.run.meta import META_SCHEMA, read_past_sizes
from gpt_jax.run.notes import token_flops
from gpt_jax.run.progress import Progress
from gpt_jax.schema import find_misfit
from gpt_jax.train import read_meta, resolve_checkpoint

# Examples of 32 tokens. Steps 1 to 3 have 8 of them as 32 rows, 4 to 6 have 16 as 32 rows, and
# from step 7 on there are 8 whole ones.
LENGTHS = "--config.train.length_ramp=((0,8),(600,16),(2000,32))"
SIZES = "--config.train.batch_ramp=((600,16,2),(2000,8,1))"
FLAGS = (
    "--config.optim.decay_steps=8",
    "--config.data.document_mask=true",
    "--config.checkpoint.keep_last=9",
    "--config.checkpoint.every_steps=1",
    "--config.eval.every_steps=0",
    "--config.eval.batches=2",
)
ROWS = [(32, 8)] * 3 + [(32, 16)] * 3 + [(8, 32)] * 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("length_ramp")


def load(folder, *flags):
    return runs.load(folder, *FLAGS, *flags)


def run(parts, workdir):
    """Runs in this process and returns what was said."""
    lines = []
    runs.run(parts, workdir, lines.append)
    return lines


@pytest.fixture(scope="module")
def ramp(folder):
    """The parts of a run with both ramps, whose programs are compiled once for all tests."""
    return runs.build(load(folder, LENGTHS, SIZES, "--config.train.steps=8"))


@pytest.fixture(scope="module")
def whole(folder, ramp):
    """The workdir of that run, which was never stopped, and its lines."""
    return folder / "whole", run(ramp, folder / "whole")


class Killed(Exception):
    """The run ends here, as if it had been killed."""


class Watched:
    """A stream that notes its batches in `taken`, and raises Killed after `limit` of them."""

    def __init__(self, stream, taken, limit):
        self.stream = stream
        self.taken = taken
        self.limit = limit

    def __next__(self):
        if len(self.taken) == self.limit:
            raise Killed
        columns = next(self.stream)
        self.taken.append(columns)
        return columns

    def __getattr__(self, name):
        return getattr(self.stream, name)


def watch(monkeypatch, limit=None):
    """The batches that runs take from now on, of which the one after `limit` is killed."""
    taken = []
    make = loop.make_ramp_stream
    monkeypatch.setattr(
        loop, "make_ramp_stream", lambda *given: Watched(make(*given), taken, limit)
    )
    return taken


def test_each_shape_is_told_at_the_start(whole):
    _, lines = whole
    told = next(i for i, line in enumerate(lines) if line.startswith("tokens: "))
    assert "2,816 in all" in lines[told] and "each batch shape is a program" in lines[told]
    assert [line.strip() for line in lines[told + 1 : told + 4]] == [
        "steps 1 to 3: 32 rows of 8 tokens, 256 tokens a step in 1 microbatch",
        "steps 4 to 6: 32 rows of 16 tokens, 512 tokens a step in 2 microbatches",
        "steps 7 to 8: 8 rows of 32 tokens, 256 tokens a step in 1 microbatch",
    ]
    sizes = configs.read_batch_sizes([(0, 8)], [(0, 4)])
    config = load(whole[0].parent, "--config.train.length_ramp=((0,8),)")
    (line,) = loop.describe_batches(configs.resolve(config, 264), sizes, 0)
    assert line.startswith("tokens: 256 a step, as 32 rows of 8 tokens in 1 microbatch, ")


@pytest.mark.parametrize("stop", [3, 5])
def test_killed_and_resumed_to_the_bit(ramp, whole, tmp_path, monkeypatch, stop):
    """It is killed where the rows grow, and within a length."""
    with monkeypatch.context() as patch:
        watch(patch, stop)
        with pytest.raises(Killed):
            run(ramp, tmp_path)
    lines = run(ramp, tmp_path)
    assert any(line.startswith("resumed from step ") for line in lines)
    assert not any("goes on" in line for line in lines)
    for key in ("train/loss", "train/grad_norm", "throughput/tokens_seen", "eval/loss"):
        assert runs.curve(tmp_path, key) == runs.curve(whole[0], key)
    step, arrays = runs.final_state(ramp, whole[0])
    assert step == 8 and not runs.differing(arrays, runs.final_state(ramp, tmp_path)[1])


def test_batches_are_those_that_inspect_shows(ramp, whole, tmp_path, monkeypatch, capsys):
    taken = watch(monkeypatch)
    run(ramp, tmp_path)
    assert [batch["tokens"].shape for batch in taken] == ROWS
    tokens = np.concatenate([batch["tokens"].ravel() for batch in taken])
    assert np.array_equal(tokens, ramp.examples.columns(np.arange(88))["tokens"].ravel())
    seen = dict(enumerate(np.cumsum([a * b for a, b in ROWS]).tolist(), 1))
    assert runs.curve(tmp_path, "throughput/tokens_seen") == seen
    # A step that compiles has no rate, also one whose batch size was there with other rows.
    assert set(runs.curve(tmp_path, "throughput/tokens_per_second")) == {2, 3, 5, 6, 8}

    capsys.readouterr()
    for step, batch in enumerate(taken, 1):
        runs.call("inspect", f"--workdir={tmp_path}", f"--batch={step}", "--json")
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [row["ids"][:-1] for row in rows] == batch["tokens"].tolist()
        assert [row["ids"][-1] for row in rows] == batch["targets"][:, -1].tolist()
        assert [row["predicted"] for row in rows] == batch["weight"].sum(1).tolist()
        places = [row["example"] * row["pieces"] + row["piece"] for row in rows]
        assert places == [*range(places[0], places[0] + len(rows))]
    runs.call("inspect", f"--workdir={tmp_path}", "--batch=4", "--rows=2")
    assert "row 1: example 24, piece 2 of 2, source text, 17 tokens" in capsys.readouterr().out


def test_a_step_is_that_of_a_run_with_such_rows(folder, ramp, whole, monkeypatch, tmp_path):
    """The same columns in a run without a ramp, whose rows are as short, give the same losses."""
    taken = watch(monkeypatch)
    run(ramp, tmp_path)
    short = (
        "--config.train.batch_size=32",
        "--config.train.seq_len=8",
        "--config.model.max_seq=32",
        "--config.eval.batch_size=8",
    )
    plain = runs.build(load(folder, *short))
    losses = []
    with jax.set_mesh(plain.mesh):
        state = plain.init()
        for columns in taken[:3]:
            state, sums = plain.train_step(state, columns)
            losses.append(float(sums["loss"][0] / sums["loss"][1]))
    wanted = runs.curve(whole[0])
    np.testing.assert_allclose(losses, [wanted[step] for step in (1, 2, 3)], rtol=1e-6)


@pytest.mark.parametrize("flags", [("--config.train.loss_chunk=8",), ()])
def test_meshes_and_chunks_change_no_loss(folder, whole, tmp_path, flags):
    mesh = dict(fsdp=4) if flags else dict(data=2, tensor=2)
    run(
        runs.build(load(folder, LENGTHS, SIZES, "--config.train.steps=4", *flags), **mesh), tmp_path
    )
    wanted = runs.curve(whole[0])
    got = runs.curve(tmp_path)
    assert list(got) == [1, 2, 3, 4]
    np.testing.assert_allclose([*got.values()], [wanted[step] for step in got], rtol=1e-5)


def test_evaluation_has_whole_rows(folder, whole):
    """It is that of a run whose rows were never cut."""
    plain = runs.build(load(folder, SIZES, "--config.train.steps=8", "--config.eval.batches=0"))
    wanted = runs.heldout_loss(plain, whole[0])
    ramp = runs.build(load(folder, LENGTHS, SIZES, "--config.eval.batches=0"))
    assert runs.heldout_loss(ramp, whole[0]) == wanted
    short = "--config.train.length_ramp=((0,8),)"
    evaluate = runs.build(load(folder, short, "--config.train.steps=1", "--config.eval.batches=0"))
    run(evaluate, folder / "short")
    logged = runs.curve(folder / "short", "eval/loss")[1]
    assert logged == pytest.approx(runs.heldout_loss(plain, folder / "short"), rel=1e-6)


def test_a_resume_with_other_lengths_says_so_and_keeps_the_examples(
    folder, whole, tmp_path, monkeypatch, capsys
):
    shutil.copytree(whole[0], tmp_path / "run")
    for step in range(5, 9):
        shutil.rmtree(tmp_path / "run/checkpoints" / str(step))
    meta = read_meta(*resolve_checkpoint(tmp_path / "run"))
    assert meta["data"]["row_lengths"] == [[0, 8], [3, 16]]
    taken = watch(monkeypatch)
    other = "--config.train.length_ramp=((0,32),)"
    parts = runs.build(load(folder, other, SIZES, "--config.train.steps=6"))
    lines = run(parts, tmp_path / "run")
    wanted = "step 5 goes on with rows of 32 tokens, after 16; the examples of each update stay"
    assert wanted in lines
    assert any("length_ramp changed since" in line and "rows ahead" in line for line in lines)
    tokens = np.concatenate([batch["tokens"] for batch in taken])
    assert np.array_equal(tokens, parts.examples.columns(np.arange(40, 72))["tokens"])

    # The checkpoint knows what the config has forgotten.
    meta = read_meta(*resolve_checkpoint(tmp_path / "run"))
    assert meta["data"]["row_lengths"] == [[0, 8], [3, 16], [4, 32]]
    capsys.readouterr()
    runs.call("inspect", f"--workdir={tmp_path / 'run'}", "--batch=2", "--json")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(row["ids"]) for row in rows] == [9] * 32


def test_checkpoints_of_before_have_whole_rows(folder, whole):
    meta = read_meta(*resolve_checkpoint(whole[0]))
    config = load(folder)
    assert read_past_sizes(meta, config, whole[0]).level(7).pieces == 1
    assert read_past_sizes(meta, config, whole[0]).level(0).pieces == 4
    del meta["data"]["row_lengths"]
    assert not find_misfit(meta, META_SCHEMA)
    past = read_past_sizes(meta, config, whole[0])
    assert {level.pieces for level in past.levels} == {1}
    for lengths in ([[0, 5]], [[0, 0]], [[1, 8]], []):
        meta["data"]["row_lengths"] = lengths
        with pytest.raises(NoCheckpoint, match=r"checkpoint step 8 in .*: its position cannot be"):
            read_past_sizes(meta, config, whole[0])


def test_flops_are_those_of_the_rows_that_were_read(ramp, tmp_path):
    sizes = configs.make_batch_sizes(ramp.config.train)
    about = {}, {}, dict, print, {}, [], sizes
    progress = Progress(ramp, tmp_path, 0, False, print, *about)
    progress.writers.close()
    matmul = progress.counts["matmul"]
    each = [token_flops(ramp.config, matmul, length) for _, length in ROWS]
    assert len(set(each)) == 3
    for start, stop in ((0, 8), (2, 3), (2, 4), (3, 6), (5, 8), (6, 8)):
        weights = [rows * length for rows, length in ROWS[start:stop]]
        wanted = np.average(each[start:stop], axis=0, weights=weights)
        np.testing.assert_allclose(progress.mean_flops(start, stop), wanted, rtol=1e-12)


def test_a_kernel_that_cannot_take_a_length_is_refused():
    model = configs.resolve(configs.Config(train=configs.Train(seq_len=512)), 256).model
    problem = make_problem(model, "bfloat16", 512, "tpu")
    assert choose_kernel("auto", problem, ((0, 128), (9, 512)))[0] == "splash"
    with pytest.raises(UsageError) as refused:
        choose_kernel("auto", problem, ((0, 128), (9, 64)))
    (line,) = str(refused.value).splitlines()
    assert line.startswith("config.train.length_ramp[1] = (9, 64): splash, the attention kernel of")
    assert "divisible by 128" in line and "config.compute.kernel" in line


def test_a_command_refuses_a_length_in_one_line(folder, whole):
    command = runs.arguments(folder, whole[0], *FLAGS, SIZES, "--config.train.steps=9")
    code, message = runs.refusal(*command, "--config.train.length_ramp=((0,12),)")
    assert code == 2 and "config.train.length_ramp[0] = (0, 12)" in message
    assert "such as 8" in message
