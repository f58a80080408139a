"""What the plan counts of remat `names`, against the traced program and the compiler's word."""

import math
from dataclasses import replace

import pytest
from plans import ONE, changed, job_of, llama, read_plan, run_plan
from programs import count_left_bytes, list_matmuls, trace_layers

from gpt_jax import config as configs
from gpt_jax.plan.experts import count_places, widen_for_buffers
from gpt_jax.plan.memory import estimate_memory, kept_bytes
from gpt_jax.plan.remat import host_bytes, is_recomputed, repeated_part

ROWS, LENGTH, LAYERS = 2, 256, 2


def shrink(name: str, *overrides: str):
    """A job of a few layers and one width, whose program is traced in a second."""
    words = ("model.layers=2", "model.embed=64", "model.vocab=64", *overrides)
    job = job_of(name, *(f"--config.{word}" for word in words))
    model = replace(job.config.model, max_seq=LENGTH)
    train = replace(job.config.train, seq_len=LENGTH, batch_size=ROWS, accumulate=1)
    return job._replace(config=replace(job.config, model=model, train=train))


DENSE = ("model.heads=4", "model.kv_heads=2", "model.head_dim=16", "model.mlp=96")
SPARSE = (
    *DENSE,
    "model.experts=4",
    "model.expert_mlp=32",
    "model.shared_experts=1",
    "model.dispatch=capacity",
    "data.document_mask=false",
)
LISTS = [
    (("q", "k", "v"), ()),
    (("attention", "mlp_hidden"), ()),
    (("attention_out", "mlp_in"), ("layer_in",)),
    ((), ("attention", "v", "mlp_in")),
]
EXPERTS = [(("experts_in",), ("experts_out",)), (("mlp_in",), ("layer_in", "q"))]
CASES = [("llama:1b", DENSE, *lists) for lists in LISTS]
CASES += [("moe:8x7b", SPARSE, *lists) for lists in EXPERTS]


@pytest.mark.parametrize("kernel", ["reference", "splash"])
@pytest.mark.parametrize("name, overrides, save, offload", CASES)
def test_bytes_are_those_that_the_traced_layers_leave(name, overrides, save, offload, kernel):
    """On the device and on the host, layer by layer, to the byte."""
    lists = dict(remat="names", remat_save=save, remat_offload=offload)
    compute = dict(lists, dtype="bfloat16", kernel=kernel)
    job = changed(shrink(name, *overrides), compute=compute)
    model = job.config.model

    left = count_left_bytes(trace_layers(model, job.config.compute, ROWS), LAYERS)
    places = count_places(job.config, ONE, ROWS * LENGTH, "tpu")
    device = 0.0
    host = 0.0
    for widths in job.layers:
        widths = widen_for_buffers(widths, job.config, places, "tpu")
        device += ROWS * LENGTH * kept_bytes(job, widths, ONE, kernel)
        host += ROWS * LENGTH * host_bytes(job, widths, ONE, kernel)
    assert (left["device"], left["host"]) == (device, host)


def test_activations_of_llama_8b_by_names():
    """A stream is 8,192 x 4,096 in bfloat16, and up and gate are 7 streams."""
    job = changed(llama(), train=dict(batch_size=64, accumulate=1))
    stream = 8192 * 4096 * 2

    def estimate(**lists):
        named = changed(job, compute=dict(lists, remat="names"))
        return estimate_memory(named, ONE | {"fsdp": 64}, "splash", "tpu")

    saved = estimate(remat_save=("attention_out", "mlp_in"))
    assert saved.activations == (1 + 32 * (1 + 1 + 7)) * stream
    assert saved.host.activations == 0
    offloaded = estimate(remat_save=("attention_out",), remat_offload=("layer_in", "mlp_in"))
    assert offloaded.activations == (1 + 32) * stream
    assert offloaded.host.activations == 32 * (1 + 7) * stream
    assert offloaded.peak < saved.peak


@pytest.mark.parametrize(
    "save", [(), ("q", "k", "v"), ("attention_out", "mlp_in"), ("q", "k", "v", "mlp_in")]
)
def test_the_part_of_the_matmuls_that_is_repeated(save):
    """Matmuls of weights in the traced program, over those without remat, by their FLOPs."""
    job = shrink("llama:1b", *DENSE)
    compute = configs.Compute(dtype="bfloat16", kernel="splash")
    named = replace(compute, remat="names", remat_save=save)

    def count_flops(compute) -> float:
        """Multiplications of tokens with weights; those of attention's maps have batch dims."""
        total = 0
        for (_, left), (_, right) in list_matmuls(trace_layers(job.config.model, compute, ROWS)):
            if len(left) == len(right) == 2 and ROWS * LENGTH in (*left, *right):
                summed = max({*left} & {*right})
                total += math.prod((*left, *right)) / summed
        return total

    plain = count_flops(compute)
    more = count_flops(named) / plain - 1
    part = repeated_part(changed(job, compute=vars(named)), "tpu")
    assert more == pytest.approx(part / 3)


def test_what_is_computed_again_is_what_has_no_name():
    compute = configs.Compute(remat="names", remat_save=("q",), remat_offload=("k",))
    assert [is_recomputed(compute, name) for name in ("q", "k", "v")] == [False, False, True]
    assert is_recomputed(configs.Compute(remat="block"), "q")
    assert not is_recomputed(configs.Compute(remat="dots"), "q")


SMALL = (
    "mesh.data=1",
    "mesh.fsdp=4",
    "compute.dtype=bfloat16",
    "model.layers=4",
    "model.embed=256",
    "model.vocab_multiple=64",
    "train.seq_len=256",
)


def test_the_compiler_for_tpus_puts_on_the_host_what_is_counted_there(capsys):
    """Moments are arguments in the host's memory, and named values its temporaries."""
    pytest.importorskip("libtpu", reason="pip install 'gpt_jax[plan]'")
    words = [
        *SMALL,
        "optim.state_memory=host",
        "compute.remat=names",
        "compute.remat_save=attention_out",
        "compute.remat_offload=layer_in,mlp_in",
    ]
    run_plan("tiny", "v5e:2x2", "--compile", "--json", *(f"--config.{word}" for word in words))
    report = read_plan(capsys)
    host = report["arithmetic"]["host_memory"]
    memory = report["arithmetic"]["memory"]
    compiled = report["compiled"]
    assert compiled["host_argument"] == pytest.approx(host["optimizer"], rel=0.02)
    assert compiled["host_temporary"] == pytest.approx(host["activations"], rel=0.02)
    assert host["optimizer"] == pytest.approx(2 * memory["parameters"], rel=1e-3)

    # Nothing of the moments is left among the device's own arguments.
    assert memory["optimizer"] < 100
    assert compiled["argument"] == pytest.approx(memory["parameters"] + memory["batch"], rel=0.02)
    assert [note for note in report["notes"] if "state_memory" in note]
