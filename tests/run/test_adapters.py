"""Runs that learn adapters: their checkpoints, what lies beneath, and the way out to others."""

import json
import shutil
from functools import partial
from types import SimpleNamespace
from typing import cast

import jax
import numpy as np
import pytest
import runs

from gpt_jax import config as configs
from gpt_jax.errors import UsageError
from gpt_jax.evals.evaluators import EVALUATORS
from gpt_jax.interop.weights import find_depths, list_shapes
from gpt_jax.model import abstract_params
from gpt_jax.run import adapters, convert
from gpt_jax.run.evaluation import find_weights
from gpt_jax.run.progress import Progress
from gpt_jax.run.restore import load_model
from gpt_jax.run.resume import start_new
from gpt_jax.run.source import find_source
from gpt_jax.run.warm_start import start_from
from gpt_jax.train import nest_paths, read_meta, resolve_checkpoint

TEXT = "abcde fghij abcde"
LORA = ("--config.lora.rank=4", "--config.lora.alpha=8", "--config.optim.learning_rate=2e-2")
BASE = ("--config.train.steps=40", "--config.log.every_steps=40", "--config.eval.every_steps=40")
STEPS = ("--config.train.steps=6", "--config.eval.every_steps=3", "--config.eval.batches=1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def base(folder):
    """The workdir of a finished run whose weights lie beneath the adapters."""
    runs.run(runs.build(runs.load(folder, *BASE)), folder / "base")
    return folder / "base"


def start_from_base(folder, base, *overrides) -> configs.Config:
    """A run on another text, which begins with the weights of the base."""
    text = folder / "other.txt"
    text.write_text("abcab " * 2000)
    flags = (f"--config.init.from={base}", f"--config.data.path={text}", *STEPS)
    return runs.load(folder, *flags, *overrides)


def load(folder, base, *overrides) -> configs.Config:
    return start_from_base(folder, base, *LORA, *overrides)


@pytest.fixture(scope="module")
def learned(folder, base):
    """The workdir of a finished run that has learned dora adapters on eight devices."""
    config = load(folder, base, "--config.lora.variant=dora", "--config.checkpoint.every_steps=3")
    parts = runs.build(config, data=2, fsdp=2, tensor=2)
    runs.run(parts, folder / "learned")
    return folder / "learned"


def test_only_adapters_are_saved(base, learned):
    meta = read_meta(*resolve_checkpoint(learned))
    names = json.loads((learned / "checkpoints/6/params/_METADATA").read_text())["tree_metadata"]
    assert len(names) == 6 * 3 and all("attention" in name or "mlp" in name for name in names)
    assert meta["base"]["from"] == f"{base}@40"
    moments = json.loads((learned / "checkpoints/6/train/_METADATA").read_text())["tree_metadata"]
    assert sum("mu" in name for name in moments) == 6 * 3
    assert all("embed" not in name for name in (*names, *moments))


def test_losses_begin_at_those_of_the_base(folder, base, learned):
    """One device and eight give one curve, and the first loss is the base's own."""
    config = load(folder, base, "--config.lora.variant=dora", "--config.checkpoint.every_steps=3")
    runs.run(runs.build(config), folder / "alone")
    ours = runs.curve(folder / "alone", "train/loss")
    theirs = runs.curve(learned, "train/loss")
    assert ours.keys() == theirs.keys()
    assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=2e-5)

    parts = runs.build(start_from_base(folder, base))
    runs.run(parts, folder / "full")
    assert runs.curve(folder / "full")[1] == pytest.approx(ours[1], abs=1e-6)
    heldout = runs.curve(folder / "alone", "eval/loss")
    assert heldout[6] < heldout[3] - 0.01


def test_a_stopped_run_goes_on_to_the_bit(folder, base, learned):
    """Step 3 of the finished run, on the same mesh, leads to the same step 6.

    The weights beneath have moved meanwhile. Step 6 names their new place.
    """
    again = folder / "again"
    shutil.copytree(learned, again)
    shutil.rmtree(again / "checkpoints/6")
    elsewhere = folder / "elsewhere"
    shutil.copytree(base, elsewhere)
    flags = ("--config.lora.variant=dora", "--config.checkpoint.every_steps=3")
    config = load(folder, elsewhere, *flags)
    lines = []
    parts = runs.build(config, data=2, fsdp=2, tensor=2)
    runs.run(parts, again, lines.append)
    assert any("resumed from step 3" in line for line in lines)
    assert read_meta(*resolve_checkpoint(again))["base"]["from"] == f"{elsewhere}@40"
    parts = runs.build(load(folder, base, *flags), data=2, fsdp=2, tensor=2)
    assert not runs.differing(
        runs.final_state(parts, learned)[1], runs.final_state(parts, again)[1]
    )


def test_the_checkpoint_is_a_model(folder, learned):
    """Loaded on one device and on eight, merged slice by slice, and exported: one set of logits."""
    lines = []
    loaded = load_model(str(learned), 0, lines.append, devices=1)
    wanted = loaded.logits(TEXT)
    close = dict(rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        load_model(str(learned), 0, lines.append).logits(TEXT), wanted, **close
    )
    assert loaded.config.lora.rank == 0
    origin = convert.open_model(str(learned), 0, lines.append)
    for path, values in runs.by_path(loaded.params).items():
        name = "/".join(part.strip("'[]") for part in path.split("]["))
        whole = tuple(slice(0, size) for size in values.shape)
        np.testing.assert_allclose(origin.read(name, whole), values, rtol=1e-5, atol=1e-6)

    hf, native = folder / "hf", folder / "native"
    runs.call("convert", f"--from={learned}", f"--to={hf}")
    runs.call("convert", f"--from={hf}", f"--to={native}", "--tokenizer=bytes")
    logits = load_model(str(native), 0, lines.append).logits(TEXT)
    np.testing.assert_allclose(logits, wanted, **close)


def test_peft_is_refused_where_it_cannot_be(folder, base, learned):
    """GPT-2 joins q, k and v into one tensor. See tests/interop/test_peft.py for what can be."""
    for source, words in (
        (base, "has no adapters; write it as hf"),
        (learned, "transformer.h.0.attn.c_attn.weight of this family holds 3 matrices"),
    ):
        flags = (f"--from={source}", f"--to={folder / 'peft'}", "--format=peft")
        code, message = runs.refusal("convert", *flags)
        assert code == 2 and words in message and not (folder / "peft").exists()


def test_weights_with_adapters_are_a_beginning(folder, learned):
    """All weights can be learned from there. Other adapters need merged weights beneath them."""
    parts = runs.build(runs.load(folder, f"--config.init.from={learned}", *STEPS))
    with jax.set_mesh(parts.mesh):
        source = find_source(parts.config.init, lambda line: None)
        params = start_from(parts, source, lambda line: None).params
    merged = load_model(str(learned), 0, lambda line: None, devices=1).params
    jax.tree.map(np.testing.assert_array_equal, params, merged)

    flags = (f"--config.init.from={learned}", *LORA, *STEPS)
    code, message = runs.refusal(*runs.arguments(folder, folder / "second", *flags))
    assert code == 2 and "merge it first, with gpt-jax convert --format=native" in message
    runs.call("convert", f"--from={learned}", f"--to={folder / 'merged'}", "--format=native")
    parts = runs.build(load(folder, folder / "merged"))
    with jax.set_mesh(parts.mesh):
        started = start_new(parts, lambda line: None)
    assert started.base["from"] == f"{folder / 'merged'}@0"
    # Slices are merged on the host, and rounded otherwise than on a device.
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, started.frozen["base"], merged)


def open_both(path, base=""):
    """Opens a checkpoint on devices, then slice by slice."""
    yield lambda: load_model(str(path), 0, lambda line: None, devices=1, base=str(base))
    yield lambda: convert.open_model(str(path), 0, lambda line: None, base=str(base))


def test_the_base_must_be_there_and_be_the_same(folder, base, learned):
    moved = folder / "moved"
    base.rename(moved)
    try:
        for call in open_both(learned):
            with pytest.raises(UsageError) as refused:
                call()
            message = str(refused.value)
            assert f"need the weights at {base}@40" in message and "\n" not in message
            assert "--base=DIR" in message and "config.init.from = " not in message
        for call in open_both(learned, moved):
            call()
    finally:
        moved.rename(base)

    # Here the weights have been merged with the adapters, so they are others.
    for call in open_both(learned, learned):
        with pytest.raises(UsageError, match="were learned beside other weights"):
            call()
    for call in open_both(base, base):
        with pytest.raises(UsageError, match="has no adapters; leave it out"):
            call()


@pytest.mark.parametrize("name", EVALUATORS)
def test_an_evaluator_that_asks_the_model_gets_merged_weights(name):
    asks = name not in ("heldout", "xz")
    knobs = SimpleNamespace(eval=SimpleNamespace(evaluators=("heldout", name)))
    parts = SimpleNamespace(merge=lambda params, frozen: "merged", frozen=None)
    progress = cast(Progress, SimpleNamespace(config=knobs, parts=parts))
    assert find_weights(progress, "adapters") == ("merged" if asks else "adapters")


def test_a_fingerprint_is_of_the_values(mesh):
    """It is that of any mesh and of any cut, and each bit and place counts."""
    model = configs.resolve(
        configs.Config(model=configs.Model(layers=2, embed=16, heads=2, vocab=32))
    ).model
    rng = np.random.default_rng(0)
    shapes = list_shapes(model)
    arrays = {path: rng.standard_normal(shape, np.float32) for path, shape in shapes.items()}
    tree = nest_paths(arrays)
    own = adapters.fingerprint(tree)

    def of_slices():
        return adapters.fingerprint_slices(
            shapes, find_depths(model), lambda path, index: arrays[path][index]
        )

    assert of_slices() == own
    made = mesh(2, 2, 2)
    with jax.set_mesh(made):
        like = abstract_params(model)
        placed = jax.tree.map(
            lambda x, like: jax.device_put(x, jax.NamedSharding(made, like.sharding.spec)),
            tree,
            like,
        )
        assert adapters.fingerprint(placed) == own

    table = arrays["embed/table"]
    table[[0, 1]] = table[[1, 0]]
    assert of_slices() != own
    table[[0, 1]] = table[[1, 0]]
    assert of_slices() == own
    table[3, 3] = np.nextafter(table[3, 3], np.float32(9))
    assert of_slices() != own


@pytest.mark.parametrize(
    "overrides, words",
    [
        (("--config.init.from=",), "config.lora.rank = 4: needs weights beneath"),
        (("--config.lora.rank=500",), "config.lora.rank = 500: is more than the rank of"),
        (("--config.lora.targets=heads",), "config.lora.targets[0] = 'heads': is no role"),
        (("--config.lora.targets=norm",), "which have no adapters; name some of matrix"),
        (("--config.lora.rank=-1",), "config.lora.rank = -1"),
        (("--config.lora.alpha=0",), "config.lora.alpha = 0.0: would silence every adapter"),
        (("--config.init.optimizer=true",), "config.init.optimizer = True: takes over moments"),
        (("--config.model.vocab=512",), "config.lora.rank = 4: embed/table would grow"),
    ],
)
def test_refusals(folder, base, tmp_path, overrides, words):
    flags = (f"--config.init.from={base}", *LORA, *STEPS, *overrides)
    code, message = runs.refusal(*runs.arguments(folder, tmp_path / "run", *flags))
    assert code == 2 and words in message and "\n" not in message


def test_a_plan_is_refused():
    """A plan does not know the weights beneath."""
    flags = (f"--config={runs.TINY}", *LORA, "--config.init.from=anywhere", "--topology=h100:8")
    code, message = runs.refusal("plan", *flags)
    assert code == 2 and "plan with config.lora.rank=0" in message and "\n" not in message
