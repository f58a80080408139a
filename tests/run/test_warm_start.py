"""Runs that start from another run's weights, and changes inside one run."""

import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
import runs

from gpt_jax.errors import NoCheckpoint, UsageError
from gpt_jax.run import parts as run_parts
from gpt_jax.run.fetch import split_step
from gpt_jax.run.meta import read_config
from gpt_jax.run.source import find_source
from gpt_jax.train import read_meta, resolve_checkpoint

LONG = ("--config.train.seq_len=64", "--config.model.max_seq=64")
ROTARY = "--config.model.position=rotary"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("warm_start")


@pytest.fixture(scope="module")
def first(folder):
    """The workdir of a finished run of ten steps, with averaged weights."""
    config = runs.load(folder, ROTARY, "--config.train.steps=10", "--config.train.ema=0.9")
    runs.run(runs.build(config), folder / "first")
    return folder / "first"


def build(folder, first, *overrides: str, **mesh):
    """The parts of a run that starts from `first`, on devices of this process."""
    flags = (f"--config.init.from={first}", "--config.train.steps=2", *overrides)
    return runs.build(runs.load(folder, *flags), **mesh)


def start(parts, workdir):
    """(arrays of the first state by path, what was said)."""
    lines = []
    with jax.set_mesh(parts.mesh):
        saved = runs.checkpoints.open_checkpoints(
            workdir / "checkpoints", parts.config.checkpoint, lines.append
        )
        state = runs.resume.start_state(parts, saved, lines.append).state
        saved.close()
    return runs.by_path(state), lines


def saved_arrays(first, item="params"):
    parts = runs.build(
        runs.load(first.parent, ROTARY, "--config.train.steps=10", "--config.train.ema=0.9")
    )
    state = runs.restored(parts, first)
    return runs.by_path({"params": state.params, "ema": state.ema}[item])


def params_of(arrays, attribute=".params"):
    return {
        path.removeprefix(attribute): value
        for path, value in arrays.items()
        if path.startswith(f"{attribute}[")
    }


@pytest.mark.parametrize("item", ["params", "ema"])
@pytest.mark.parametrize("shape", [{}, dict(data=2, fsdp=2, tensor=2)])
def test_a_new_run_has_the_weights_and_nothing_else(folder, first, tmp_path, item, shape):
    """Another batch, row length, schedule and mesh; the optimiser and the step are fresh."""
    flags = (
        ROTARY,
        *LONG,
        "--config.train.batch_size=16",
        "--config.optim.schedule=linear",
        f"--config.init.averaged={str(item == 'ema').lower()}",
    )
    parts = build(folder, first, *flags, **shape)
    arrays, lines = start(parts, tmp_path)
    assert not runs.differing(params_of(arrays), saved_arrays(first, item))
    assert int(arrays[".step"]) == 0
    moments = [x for path, x in arrays.items() if path.startswith(".opt") and x.ndim]
    assert moments and not any(x.any() for x in moments)
    assert f"started from step 10 of {first}/checkpoints" in lines[-1]


def test_the_optimiser_goes_on_and_its_schedule_begins_anew(folder, first, tmp_path):
    parts = build(folder, first, ROTARY, "--config.init.optimizer=true", "--config.train.ema=0.5")
    arrays, _ = start(parts, tmp_path)
    before = runs.by_path(
        runs.restored(
            runs.build(
                runs.load(folder, ROTARY, "--config.train.steps=10", "--config.train.ema=0.9")
            ),
            first,
        )
    )
    moments = [path for path, x in before.items() if path.startswith(".opt") and x.ndim]
    assert moments and all(np.array_equal(arrays[path], before[path]) for path in moments)
    counts = {
        path: (int(before[path]), int(arrays[path]))
        for path, x in before.items()
        if path.startswith(".opt") and not x.ndim
    }
    # Adam's own count goes on, and the schedule's does not.
    assert sorted(counts.values()) == [(10, 0), (10, 10)]
    # Averages begin with the weights.
    assert not runs.differing(params_of(arrays, ".ema"), params_of(arrays))


def test_a_vocabulary_grows(folder, first, tmp_path):
    """The old rows are the checkpoint's, and the new ones are those of a fresh run."""
    grown = (ROTARY, "--config.data.tokenizer=bytes+chat", "--config.model.vocab=288")
    for shape in ({}, dict(fsdp=2, tensor=2)):
        parts = build(folder, first, *grown, **shape)
        arrays, lines = start(parts, tmp_path)
        table = arrays[".params['embed']['table']"]
        old = saved_arrays(first)["['embed']['table']"]
        fresh = runs.by_path(
            runs.build(replace(parts.config, init=run_parts.configs.Init())).init()
        )
        assert table.shape == (288, 32) and old.shape == (264, 32)
        assert np.array_equal(table[:264], old)
        np.testing.assert_allclose(table[264:], fresh[".params['embed']['table']"][264:], rtol=1e-5)
        assert "embed/table grew from 264 to 288 rows" in lines[-1]


def test_the_tokenizer_is_the_checkpoints(folder, tmp_path, capsys):
    """A tokenizer that was made from other text goes on, where none is named."""
    for name, text in (("one", "abcabc" * 400), ("two", "cabbac" * 400)):
        (tmp_path / f"{name}.txt").write_text(text)
    flags = ("--config.data.tokenizer=char", "--config.train.steps=2")
    first = tmp_path / "first"
    runs.call(*runs.arguments(folder, first, *flags, f"--config.data.path={tmp_path}/one.txt"))

    second = runs.arguments(
        folder,
        tmp_path / "second",
        "--config.data.tokenizer=",
        "--config.train.steps=2",
        f"--config.data.path={tmp_path}/two.txt",
        f"--config.init.from={first}",
    )
    runs.call(*second)
    metas = [read_meta(*resolve_checkpoint(workdir)) for workdir in (first, tmp_path / "second")]
    assert metas[0]["tokenizer"] == metas[1]["tokenizer"]
    code, message = runs.refusal(
        *second, "--config.data.tokenizer=bytes", f"--workdir={tmp_path / 'third'}"
    )
    assert code == 2 and "ids are those of the tokenizer char" in message

    # The first run is not needed any more.
    shutil.rmtree(first)
    runs.call(*second, "--config.train.steps=3")
    assert read_meta(*resolve_checkpoint(tmp_path / "second"))["step"] == 3
    runs.call("inspect", f"--workdir={tmp_path / 'second'}", "--batch=1", "--rows=1")
    assert "source" in capsys.readouterr().out
    code, message = runs.refusal(*second, f"--workdir={tmp_path / 'third'}")
    assert code == 2 and message.startswith(f"config.init.from = '{first}': checkpoint")


def test_a_step_is_split_from_a_path(tmp_path):
    assert split_step("runs/a@300") == ("runs/a", 300)
    assert split_step("runs/a@b") == ("runs/a@b", 0)
    whole = tmp_path / "a@300"
    whole.mkdir()
    assert split_step(str(whole)) == (str(whole), 0)
    assert split_step(f"{whole}@5") == (str(whole), 5)


@pytest.mark.parametrize(
    "overrides, words",
    [
        (("--config.init.from=/none",), "config.init.from = '/none': checkpoint '/none': does not"),
        (("--config.model.layers=3",), "its weights mean something else under config.model.layers"),
    ],
)
def test_a_checkpoint_is_looked_at_before_the_text(folder, first, overrides, words):
    flags = (f"--config.init.from={first}", "--config.data.path=no-such-text", *overrides)
    with pytest.raises(UsageError) as refused:
        run_parts.build(runs.load(folder, ROTARY, *flags))
    assert words in str(refused.value)


@pytest.mark.parametrize(
    "overrides, words",
    [
        (("--config.model.heads=2",), "config.model.heads (4 there, 2 here)"),
        (("--config.model.layers=3",), "config.model.layers"),
        (("--config.model.vocab=257",), "only the vocabulary and learned positions may grow"),
        (("--config.data.tokenizer=char",), "leave config.data.tokenizer empty"),
        (
            ("--config.init.optimizer=true", "--config.model.vocab=288"),
            "have no moments for what is new",
        ),
        (("--config.init.from=none",), "config.init.from = 'none'"),
    ],
)
def test_what_cannot_start_is_refused(folder, first, tmp_path, overrides, words):
    flags = (f"--config.init.from={first}", "--config.train.steps=2", ROTARY, *overrides)
    config = runs.load(folder, *flags)
    with pytest.raises(UsageError) as refused:
        start(runs.build(config), tmp_path)
    assert words in str(refused.value)


def test_lineage_is_written_down_and_shown(folder, first, tmp_path, capsys):
    middle = tmp_path / "middle"
    flags = (ROTARY, "--config.train.steps=2", "--config.checkpoint.every_steps=1")
    runs.call(*runs.arguments(folder, middle, *flags, f"--config.init.from={first}"))
    last = runs.arguments(
        folder,
        tmp_path / "last",
        *flags,
        f"--config.init.from={middle}@1",
        "--config.train.ema=0.9",
    )
    runs.call(*last)
    # A second start of the same run keeps the line.
    runs.call(*last, "--config.train.steps=3")
    meta = read_meta(*resolve_checkpoint(tmp_path / "last"))
    assert meta["step"] == 3
    assert [(one["from"], one["step"]) for one in meta["lineage"]] == [
        (str(first), 10),
        (str(middle), 1),
    ]

    capsys.readouterr()
    runs.call("inspect", f"--workdir={tmp_path / 'last'}", "--lineage")
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in shown] == [str(first), str(middle), f"{tmp_path}/last"]
    assert "step 10, 2,560 tokens" in shown[0]


def test_a_damaged_source_is_refused(folder, first, tmp_path):
    shutil.copytree(first, tmp_path / "first")
    file = tmp_path / "first/checkpoints/10/meta.json"
    file.write_bytes(file.read_bytes().replace(b"bytes", b"bytez"))
    config = runs.load(folder, ROTARY, f"--config.init.from={tmp_path}/first@10")
    with pytest.raises(NoCheckpoint, match=r"step 10 .* is damaged: meta\.json"):
        find_source(config.init, lambda line: None)


def test_a_config_of_another_version_is_named_with_its_checkpoint(first):
    directory, step = resolve_checkpoint(first)
    meta = read_meta(directory, step)
    meta["config"]["model"] |= {"depth": 3, "width": 4}
    with pytest.raises(UsageError) as refused:
        read_config(meta, directory, step)
    one, two = str(refused.value).splitlines()
    assert one.startswith(f"checkpoint step 10 in {directory}: its config cannot be used: ")
    assert "config.model.depth = 3" in one and "config.model.width = 4" in two
