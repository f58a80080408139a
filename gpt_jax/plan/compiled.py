"""The train step of a config compiled for a machine that is not here, and what the compiler says of
it (called by commands/plan.py in a process of its own, whose environment is ready).

TPU: libtpu describes and compiles for any slice. GPU: the CUDA plugin compiles from a description
of the card (targets.py); it never says that memory is short, so the verdict is ours on both.
"""

import time
from dataclasses import dataclass, replace

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding

from gpt_jax import config as configs, sharding
from gpt_jax.errors import UsageError
from gpt_jax.hardware import find_option_fault
from gpt_jax.plan import hlo, targets
from gpt_jax.plan.topology import Topology
from gpt_jax.run import make_steps

COLUMNS = {"tokens": "int32", "targets": "int32", "weight": "float32", "bytes": "int32"}
APART = {"segment": "int32", "position": "int32"}


@dataclass(frozen=True)
class Compiled:
    """Bytes on one device by the compiler; `peak` is what has to fit: arguments, outputs that
    are not arguments' buffers, and the temporaries as one block, gaps and all (the compiler's
    own peak leaves gaps out). `program` is None when it did not compile, and then `refusal` is
    what the compiler said."""

    seconds: float
    argument: int = 0
    output: int = 0
    temporary: int = 0
    alias: int = 0
    peak: int = 0
    program: hlo.Program | None = None
    refusal: str = ""


def describe(topology: Topology):
    """The devices of a machine, as JAX sees them, slice by slice."""
    if topology.chip.platform == "gpu":
        shape = "x".join(map(str, (1, *topology.shape)))  # slices x hosts x cards
        return topologies.get_topology_desc(
            platform="cuda",
            topology_name="plan",
            topology=shape,
            target_config=targets.text(topology.name),
        ).devices
    more = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if (
        topology.chip.dims == 3 and topology.chip.per_chip == 1
    ):  # else v5p's gathers are compiled as sums
        more["wrap"] = topology.wraps
    shape = "x".join(map(str, topology.shape))
    try:
        return topologies.get_topology_desc(
            topology_name=f"{topology.name}:{shape}", platform="tpu", **more
        ).devices
    except Exception as error:
        raise UsageError(
            f"--topology={topology}: libtpu does not know it: {str(error).splitlines()[0]}"
        ) from None


def abstract_batch(config: configs.Config, mesh) -> dict:
    """The columns of a step's batch, on `mesh`."""
    shape, place = (
        (config.train.batch_size, config.train.seq_len),
        NamedSharding(mesh, sharding.batch_spec()),
    )
    columns = COLUMNS | (APART if config.data.apart else {})
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for name, dtype in columns.items()
    }


def lower(config: configs.Config, mesh):
    """The train step of a resolved config with a concrete kernel, traced for `mesh`."""
    steps = make_steps(config, mesh)
    with jax.set_mesh(mesh):
        return steps.train_step.lower(steps.abstract, abstract_batch(config, mesh))


def compile_step(config: configs.Config, topology: Topology, kernel: str, keep=None) -> Compiled:
    """`keep(text)` gets the program's text. UsageError for options that the compiler does not
    know."""
    devices = describe(topology)
    mesh = sharding.make_mesh(
        configs.check(config, len(devices)), devices, configs.cross_slice(config.mesh)
    )
    lowered = lower(replace(config, model=replace(config.model, kernel=kernel)), mesh)
    began = time.perf_counter()
    try:
        done = lowered.compile()
    except Exception as error:  # whatever the compiler refuses: for want of memory, or because of a fault of its own
        if line := find_option_fault(error):
            raise UsageError(line) from None
        return Compiled(time.perf_counter() - began, refusal=" ".join(str(error).split())[:600])
    seconds, used, text = time.perf_counter() - began, done.memory_analysis(), done.as_text()
    if keep:
        keep(text)
    held = (
        used.argument_size_in_bytes
        + used.output_size_in_bytes
        - used.alias_size_in_bytes
        + used.temp_size_in_bytes
    )
    peak = max(held, getattr(used, "peak_memory_in_bytes", 0))
    return Compiled(
        seconds,
        used.argument_size_in_bytes,
        used.output_size_in_bytes,
        used.temp_size_in_bytes,
        used.alias_size_in_bytes,
        peak,
        hlo.read(text, dict(mesh.shape)),
    )
