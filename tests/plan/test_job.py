"""The state of a job on a mesh equals the train step's own arrays, and figures made by hand."""

import math
from dataclasses import replace

import jax
import pytest
from drawn_models import make_origin
from plans import ONE, job_of, llama, spec_of

from gpt_jax import config as configs
from gpt_jax.commands.config_file import load_config
from gpt_jax.errors import UsageError
from gpt_jax.interop import write_directory
from gpt_jax.plan.job import device_bytes, resolve_vocab
from gpt_jax.run import parts
from gpt_jax.sharding.mesh import make_mesh

PARAMETERS = 8_030_261_248  # Of llama:8b.
SCALES = 65 * 4096  # Of its norms.


def test_parameters_and_optimiser_of_llama_8b_over_64_devices():
    shape = ONE | {"fsdp": 64}
    want = 4 * ((PARAMETERS - SCALES) / 64 + SCALES)
    counters = 2 * 4  # Adam's step and the schedule's.
    assert device_bytes(llama(), shape, "params") == want
    assert device_bytes(llama(), shape, "opt") == 2 * want + counters


def test_moments_on_the_host_are_no_bytes_of_the_device():
    """Adam's two moments are there, and its counters stay."""
    job = llama("--config.optim.state_memory=host")
    shape = ONE | {"fsdp": 64}
    assert device_bytes(job, shape, "host") == 2 * device_bytes(job, shape, "params")
    assert device_bytes(job, shape, "opt") == 2 * 4
    assert device_bytes(job, shape, "host", zero=1) == device_bytes(job, shape, "host")


def test_zero_1_keeps_parameters_whole_and_cuts_the_optimiser():
    job = llama()
    shape = ONE | {"fsdp": 8}
    assert device_bytes(job, shape, "params", zero=1) == 4 * PARAMETERS
    assert device_bytes(job, shape, "opt", zero=1) == device_bytes(job, shape, "opt", zero=3)


def test_pipeline_cuts_layers_and_tensor_cuts_matrices():
    layers = 32 * (4096 * (4096 + 1024) * 2 + 3 * 4096 * 14_336)
    tables = 2 * 128_256 * 4096
    piped = 4 * (layers / 4 + tables + 64 * 4096 / 4 + 4096)
    assert device_bytes(llama(), ONE | {"pipeline": 4}, "params") == piped
    cut = 4 * ((layers + tables) / 8 + SCALES)
    assert device_bytes(llama(), ONE | {"tensor": 8}, "params") == cut


@pytest.mark.parametrize("spec", ["tiny", "modern:d4"])
@pytest.mark.parametrize(
    "shape",
    [dict(fsdp=2, tensor=2, data=2), dict(fsdp=4, context=2), dict(pipeline=2, fsdp=2, tensor=2)],
)
@pytest.mark.parametrize("zero", [1, 3])
def test_state_is_that_of_the_train_step(spec, shape, zero):
    """Bytes by arithmetic are the bytes of the shards of the abstract state on the mesh itself."""
    job = job_of(spec)
    compute = replace(job.config.compute, kernel="reference")
    config = replace(job.config, compute=compute, mesh=configs.Mesh(zero=zero))
    mesh = make_mesh(shape, jax.devices()[:8])
    state = parts.make_steps(config, mesh).abstract

    def count_bytes(leaf):
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    for part, tree in (("params", state.params), ("opt", state.opt)):
        want = sum(map(count_bytes, jax.tree.leaves(tree)))
        assert device_bytes(job, dict(mesh.shape), part, zero) == want, part


def test_roles_of_parameters():
    """Tables, heads and experts have their own roles, and everything else belongs to layers."""
    job = job_of("moe:small")
    sizes = {}
    for array, size in job.state.items():
        if array.part == "params":
            sizes[array.role] = sizes.get(array.role, 0) + size

    model = job.config.model
    assert sizes["embed"] == model.vocab * model.embed
    sparse = sum(spec.ffn == "moe" for spec in configs.layer_specs(model))
    matrices = 2 * model.embed * model.expert_mlp  # Relu2 has no gate.
    assert sizes["expert"] == sparse * model.experts * matrices
    assert sum(sizes.values()) == job.parameters


@pytest.mark.parametrize(
    "text, vocab",
    [("bytes", 257), ("bpe:1000", 1000), ("bpe:1_000:gpt2+chat", 1002), ("bytes+fim", 260)],
)
def test_a_tokenizer_with_a_size_of_its_own(text, vocab):
    overrides = [
        f"--config.data.tokenizer={text}",
        "--config.model.vocab=0",
        "--config.model.vocab_multiple=1",
    ]
    assert resolve_vocab(load_config(spec_of("tiny"), overrides)).model.vocab == vocab


def test_a_plan_reads_no_text():
    assert resolve_vocab(load_config(spec_of("tiny"), [])).model.vocab == 264
    with pytest.raises(UsageError, match=r"config\.model\.vocab = 0: a plan reads no text"):
        resolve_vocab(load_config(spec_of("shakespeare_char:cpu"), []))

    prepared = ["--config.data.path=corpus", "--config.data.tokenizer=", "--config.model.vocab=0"]
    words = r"config\.data\.tokenizer = '' means that of the prepared folder or token files"
    with pytest.raises(UsageError, match=words):
        resolve_vocab(load_config(spec_of("tiny"), prepared))


def test_the_model_is_that_of_the_weights(tmp_path):
    """A plan of a run that starts from a directory counts the directory's model."""
    origin = make_origin()
    write_directory(origin, tmp_path / "hf")
    given = [f"--config.init.from={tmp_path / 'hf'}", "--config.init.model=checkpoint"]
    model = resolve_vocab(load_config(spec_of("tiny"), given)).model
    assert replace(model, vocab_multiple=1) == origin.model
