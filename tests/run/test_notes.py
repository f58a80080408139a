"""The lines at the start of a run say what its program does."""

import re
from dataclasses import replace

import jax
import pytest
import runs

from gpt_jax import config as configs
from gpt_jax.errors import UsageError
from gpt_jax.run.notes import describe_dtypes, describe_fp8, describe_habits, describe_lookup
from gpt_jax.sharding.mesh import make_mesh

NAMES = {"f32": "float32", "bf16": "bfloat16"}


@pytest.mark.parametrize(
    "dtype, reduce_dtype, short",
    [
        ("float32", "compute", "f32"),
        ("bfloat16", "compute", "bf16"),
        ("bfloat16", "float32", "f32"),
    ],
)
def test_gradients_are_summed_in_the_dtype_that_the_line_names(
    tmp_path, dtype, reduce_dtype, short
):
    config = runs.load(
        tmp_path,
        f"--config.compute.dtype={dtype}",
        f"--config.compute.reduce_dtype={reduce_dtype}",
        "--config.train.loss_chunk=0",
    )
    parts = runs.build(config, fsdp=2)
    size = config.train.batch_size
    columns = next(iter(runs.make_stream(parts.examples, size, slice(0, size))))
    with jax.set_mesh(parts.mesh):
        batch = runs.rows.to_devices(parts.mesh, columns, size)
        text = str(parts.train_step.trace(parts.abstract, batch).jaxpr)
    summed = set(re.findall(r":(\w+)\[[^]]*\][^=]*= \w*reduce_scatter", text))
    assert summed - {"f32"} == {short} - {"f32"}  # embeddings are looked up in float32

    line = describe_dtypes(config)
    if dtype == "float32":
        assert line == "float32 compute, parameters and sums"
    else:
        assert line.endswith(f"devices sum the gradients of matmuls in {NAMES[short]}")


@pytest.mark.parametrize(
    "train, end",
    [
        (dict(accumulate=2), "in bfloat16"),
        (dict(reduce_once=True), "in bfloat16"),
        (dict(reduce_once=True, accumulate=2), "in float32"),
        (
            dict(reduce_once=True, batch_ramp=((100, 16, 2),)),
            "in bfloat16, and in float32 where an update has several microbatches",
        ),
    ],
)
def test_gradients_that_are_summed_once_are_summed_in_float32(train, end):
    """Each device adds up its own ones of all microbatches before, in float32."""
    compute = configs.Compute(dtype="bfloat16")
    line = describe_dtypes(configs.Config(compute=compute, train=configs.Train(**train)))
    assert line.endswith(f"devices sum the gradients of matmuls {end}")


@pytest.mark.parametrize(
    "platform, kind, said",
    [
        ("gpu", "NVIDIA H200", ""),
        ("tpu", "TPU7x", ""),
        ("tpu", "TPU v6 lite", "TPU v6 lite has none, so XLA emulates them"),
        ("gpu", "NVIDIA A100-SXM4-80GB", "has none, so XLA emulates them"),
        ("cpu", "cpu", "cpu has none, so XLA emulates them"),
        ("gpu", "NVIDIA Q1", "nobody knows whether 'NVIDIA Q1' has them"),
    ],
)
def test_fp8_says_what_it_is_for_and_where_it_is_emulated(platform, kind, said):
    model = configs.Model(pattern=(("attention", "moe"),))
    compute = configs.Compute(dtype="bfloat16", matmul_dtype="fp8")
    about, *rest = describe_fp8(configs.Config(model=model, compute=compute), platform, kind)
    assert "experts and all other matmuls are in bfloat16" in about
    assert "MFU is relative to the bf16 peak" in about
    assert [said in line for line in rest] == ([True] if said else [])
    assert describe_fp8(configs.Config(model=model), platform, kind) == []


def test_a_run_says_how_it_looks_up_embeddings():
    """On fsdp 4 it is 2,048 tokens of 256 entries, or a table of 4,096 rows, both in float32."""
    model = configs.Model(embed=256, vocab=4096, position="rotary")
    train = configs.Train(batch_size=8, seq_len=1024)
    config = configs.Config(model=model, train=train)

    def describe(**shape):
        return describe_lookup(config, make_mesh(shape, jax.devices()[:4]))

    sent = "(a device sends for a microbatch: tables 6 MiB, columns 3.02 MiB)"
    assert describe(fsdp=4) == [f"embedding lookup: columns {sent}"]
    assert describe(data=4) == []

    # Later updates have eight times as many tokens.
    config = replace(config, train=replace(train, batch_ramp=((100, 64, 1),)))
    first, later = describe(fsdp=4)[0].split(", later ")
    assert first == f"embedding lookup: columns {sent}"
    assert later == "tables (a device sends for a microbatch: tables 6 MiB, columns 24.2 MiB)"


def test_a_matmul_of_experts_that_the_machine_lacks_ends_the_run(tmp_path):
    flags = [f"--config={runs.ROOT}/configs/moe.py:small", f"--workdir={tmp_path}"]
    flags += ["--config.data.path=stdlib", "--config.compute.expert_matmul=grouped"]
    code, message = runs.refusal("train", *flags)
    assert code == UsageError.code
    assert message == (
        "config.compute.expert_matmul = 'grouped': cpu does not have it; choose auto or blocks"
    )


def test_a_run_in_fp8_prints_it_and_joins_no_projections(tmp_path):
    notes = runs.build(runs.load(tmp_path, "--config.compute.matmul_dtype=fp8")).notes
    assert sum(line.startswith("fp8 matmuls: ") for line in notes) == 2
    assert any("habits of cpu: projections one by one" in line for line in notes)
    plain = runs.build(runs.load(tmp_path)).notes
    assert not any("fp8" in line for line in plain)
    assert any("habits of cpu: projections joined" in line for line in plain)


@pytest.mark.parametrize("dtype, is_named", [("bfloat16", True), ("float32", False)])
def test_a_line_names_rotary_positions_by_matmul(dtype, is_named, monkeypatch):
    """It does on a TPU, for the dtype that rotates so."""
    row = configs.find_habits("tpu")
    monkeypatch.setattr(configs, "find_habits", lambda *_: row)
    model = configs.Model(position="rotary")
    config = configs.resolve(configs.Config(model=model, compute=configs.Compute(dtype=dtype)))
    line = describe_habits(config, make_mesh({}, jax.devices()[:1]))
    assert line.startswith("habits of tpu: ")
    assert ("rotary positions by matmul" in line) == is_named
    learned = replace(config, model=replace(model, position="learned"))
    assert "rotary" not in describe_habits(learned, make_mesh({}, jax.devices()[:1]))


@pytest.mark.parametrize(
    "width, matmul_dtype, is_named",
    [(128, "compute", True), (64, "compute", False), (128, "fp8", False)],
)
def test_a_line_names_projections_by_heads(width, matmul_dtype, is_named, monkeypatch):
    row = configs.find_habits("tpu")
    monkeypatch.setattr(configs, "find_habits", lambda *_: row)
    config = configs.Config(
        model=configs.Model(head_dim=width), compute=configs.Compute(matmul_dtype=matmul_dtype)
    )
    line = describe_habits(configs.resolve(config), make_mesh({}, jax.devices()[:1]))
    assert ("projections by heads" in line) == is_named
