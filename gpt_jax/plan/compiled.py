"""The train step of a config, compiled for a machine that is not here.

libtpu describes any slice and compiles for it. The CUDA plugin compiles from the description of a
card. Neither decides whether the program fits, because the one for GPUs never says that memory is
short. The compilers read their environment when they are loaded, so this runs in a process whose
environment is ready.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding

from gpt_jax import config as configs, sharding
from gpt_jax.errors import UsageError
from gpt_jax.files import describe_error
from gpt_jax.hardware import find_option_fault
from gpt_jax.plan.estimate import choose_plan_kernel, find_problems
from gpt_jax.plan.job import resolve_vocab
from gpt_jax.plan.program.program import Program, read_program
from gpt_jax.plan.targets import describe_card
from gpt_jax.plan.topology import Topology, join_sizes
from gpt_jax.run import make_steps

# Types of a batch's columns. The second table has those that a document mask adds.
COLUMNS = {"tokens": "int32", "targets": "int32", "weight": "float32", "bytes": "int32"}
DOCUMENT_COLUMNS = {"segment": "int32", "position": "int32"}
REFUSAL_LENGTH = 600  # Characters of the compiler's message that are kept.


@dataclass(frozen=True)
class Compiled:
    """Bytes on one device by the compiler, or why it did not compile."""

    seconds: float
    argument: int = 0
    output: int = 0
    temporary: int = 0
    alias: int = 0
    host_argument: int = 0  # In the memory of the host, as is the next one.
    host_temporary: int = 0
    # What has to fit: arguments, outputs that are not arguments' buffers, and the temporaries as
    # one block with its gaps. The compiler's own peak leaves the gaps out.
    peak: int = 0
    program: Program | None = None  # None if it did not compile.
    refusal: str = ""  # What the compiler said if it did not compile.


def list_devices(topology: Topology) -> list:
    """Returns the devices of a machine as JAX sees them, slice by slice.

    Raises UsageError if libtpu does not know the machine.
    """
    if topology.chip.platform == "gpu":
        sizes = (1, *topology.shape)  # Slices, hosts, cards of a host.
        described = topologies.get_topology_desc(
            platform="cuda",
            topology_name="plan",
            topology=join_sizes(sizes),
            target_config=describe_card(topology.name),
        )
        return described.devices

    options: dict[str, object] = {}
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    # Without this option the gathers of v5p are compiled as sums.
    if topology.chip.dims == 3 and topology.chip.per_chip == 1:
        options["wrap"] = topology.wraps
    name = f"{topology.name}:{join_sizes(topology.shape)}"
    try:
        return topologies.get_topology_desc(topology_name=name, platform="tpu", **options).devices
    except Exception as error:
        raise UsageError(
            f"--topology={topology}: libtpu does not know it: {describe_error(error)}"
        ) from None


def make_abstract_batch(config: configs.Config, mesh) -> dict:
    """Returns the columns of a step's batch on `mesh`, as shapes."""
    shape = config.train.batch_size, config.train.seq_len
    place = NamedSharding(mesh, sharding.batch_spec())
    columns = COLUMNS | DOCUMENT_COLUMNS if config.data.document_mask else COLUMNS
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for name, dtype in columns.items()
    }


def lower_step(config: configs.Config, mesh):
    """Traces the train step of a resolved config with a concrete kernel for `mesh`."""
    steps = make_steps(config, mesh)
    with jax.set_mesh(mesh):
        return steps.train_step.lower(steps.abstract, make_abstract_batch(config, mesh))


def compile_job(
    config: configs.Config, topology: Topology, keep: Callable[[str], object] | None = None
) -> dict:
    """Compiles the train step of a config, and returns a Compiled as a dictionary.

    `keep` gets the program's text. Raises UsageError if the config cannot run on the machine, or if
    the compiler does not know an option of it.
    """
    config = resolve_vocab(config)
    shape, problems = find_problems(config, topology.devices)
    if shape is None or problems:
        raise UsageError(problems[0])
    kernel, _ = choose_plan_kernel(config, topology, shape)
    return asdict(compile_step(config, topology, kernel, keep))


def compile_step(
    config: configs.Config,
    topology: Topology,
    kernel: str,
    keep: Callable[[str], object] | None = None,
) -> Compiled:
    """Compiles the train step with this attention kernel; `keep` gets the program's text.

    Raises UsageError if the compiler does not know an option of the config.
    """
    devices = list_devices(topology)
    shape = configs.check(config, len(devices))
    mesh = sharding.make_mesh(shape, devices, configs.cross_slice(config.mesh))
    lowered = lower_step(replace(config, compute=replace(config.compute, kernel=kernel)), mesh)

    began = time.perf_counter()
    try:
        program = lowered.compile()
    except Exception as error:
        # The compiler refuses for want of memory, because of an option, or by a fault of its own.
        fault = find_option_fault(error)
        if fault:
            raise UsageError(fault) from None
        refusal = " ".join(str(error).split())[:REFUSAL_LENGTH]
        return Compiled(time.perf_counter() - began, refusal=refusal)
    seconds = time.perf_counter() - began

    text = program.as_text()
    if keep:
        keep(text)
    return _measure(program.memory_analysis(), seconds, read_program(text, dict(mesh.shape)))


def _measure(used, seconds: float, program: Program) -> Compiled:
    """`used` is the compiler's own account of the program's memory.

    Its peak counts what is offloaded to the host's memory, so it is left aside for such programs.
    """
    together = (
        used.argument_size_in_bytes
        + used.output_size_in_bytes
        - used.alias_size_in_bytes
        + used.temp_size_in_bytes
    )
    is_offloaded = used.host_temp_size_in_bytes + used.host_argument_size_in_bytes > 0
    peak = together if is_offloaded else max(together, getattr(used, "peak_memory_in_bytes", 0))
    return Compiled(
        seconds,
        argument=used.argument_size_in_bytes,
        output=used.output_size_in_bytes,
        temporary=used.temp_size_in_bytes,
        alias=used.alias_size_in_bytes,
        host_argument=used.host_argument_size_in_bytes,
        host_temporary=used.host_temp_size_in_bytes,
        peak=peak,
        program=program,
    )
