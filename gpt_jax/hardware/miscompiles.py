"""Known faults of compilers that a run on this machine could meet, each from a public report.

`check_miscompiles` runs a tiny program for each of them. What passed is remembered by versions and
kind of device, and the next start runs none. docs/miscompiles.md is made from the table:

    python -m gpt_jax.hardware.miscompiles >docs/miscompiles.md
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np

import gpt_jax
from gpt_jax.errors import Miscompiled
from gpt_jax.files import digest_json, replace_file
from gpt_jax.hardware.xla_flags import JAX_CAME_FIRST, NAME, YNN

FOLDER = "~/.cache/gpt_jax"


class Machine(NamedTuple):
    """What decides whether a fault is here."""

    device: jax.Device  # pyright: ignore[reportInvalidTypeForm] # It is a class.
    jaxlib: str


class Miscompile(NamedTuple):
    """A fault and how it is looked for.

    `look` returns what it saw if the fault is here, else "".
    """

    reports: tuple[str, ...]  # Issues of jax-ml/jax.
    platforms: tuple[str, ...]
    reported: str  # Where others saw it.
    symptom: str
    look: Callable[[Machine], str]
    way_out: str


def _name_number(value) -> str:
    return f"{float(value):,}"


def look_at_sums(machine: Machine) -> str:
    """A vmapped product of matrix and row, then a sum of squares. The last is 32,768 squared."""
    column = np.arange(32_769, dtype=np.float32)
    rows = np.stack([column, 0 * column, 0 * column], axis=1)
    matrix = np.eye(3, dtype=np.float32)

    @jax.jit
    def sums(matrix, rows):
        return jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2))(rows)

    value = sums(matrix, rows)[-1]
    right = 32_768.0**2
    return "" if value == right else f"{_name_number(value)} for {_name_number(right)}"


def gives_sums_to_ynn(machine: Machine) -> bool:
    """Whether this CPU program is handed to YNN by a jaxlib where that goes wrong.

    It is compiled and not run, because running it could end this process.
    """
    if machine.device.platform != "cpu" or machine.jaxlib not in YNN.jaxlibs:
        return False
    like = jax.ShapeDtypeStruct((3, 1, 2, 2, 8, 8, 8), jnp.float32)
    compiled = jax.jit(lambda a, b: (a * b).sum(3)).lower(like, like).compile()
    return "__ynn_fusion" in (compiled.as_text() or "")


def look_for_ynn_crash(machine: Machine) -> str:
    """By version, and by what a sum over one of seven dimensions is compiled to. It is not run."""
    if not gives_sums_to_ynn(machine):
        return ""
    return f"jaxlib {machine.jaxlib} gives such sums to the library YNN"


def softmax_of_scaled(scores: np.ndarray) -> np.ndarray:
    """A softmax that XLA may fuse with the scaling before it."""
    return np.asarray(jax.jit(lambda scores: jax.nn.softmax(scores * 1.3, axis=-1))(scores))


LARGE_SCORE = 2.0**20
APART = np.array([[0.3, 0.9, -0.9, 0.5, -0.7]], np.float32)


def look_at_softmax(machine: Machine) -> str:
    """Scores so far apart that the largest takes everything."""
    probs = softmax_of_scaled(APART * LARGE_SCORE)
    right = APART.max() == APART
    if np.allclose(probs, right, atol=1e-3):
        return ""
    return f"{probs[0].tolist()} for {right[0].astype(float).tolist()}"


def look_at_operators(machine: Machine) -> str:
    """Operators that nobody jits, one after another."""
    root = jnp.sqrt(jnp.float32(512))
    ones = jnp.ones(4, jnp.float32) + 1
    if abs(root - 512**0.5) > 1e-3:
        return f"sqrt(512) = {_name_number(root)}"
    if not np.array_equal(ones, np.full(4, 2, np.float32)):
        return f"ones(4) + 1 = {np.asarray(ones).tolist()}"
    return ""


def look_for_triton_fusion(machine: Machine) -> str:
    """By version and device, because the report's program needs a card of that kind to be tried."""
    capability = str(getattr(machine.device, "compute_capability", ""))
    if machine.jaxlib in ("0.10.2", "0.11.0") and capability.startswith("12."):
        return f"jaxlib {machine.jaxlib} on compute capability {capability}"
    return ""


MISCOMPILES = (
    Miscompile(
        ("39103",),
        ("cpu",),
        "jaxlib 0.10.2; 0.10.1 and 0.12.0.1 are right",
        "A jitted product of a matrix with many rows, followed by a sum, is wrong.",
        look_at_sums,
        f"import gpt_jax before the first array, or start with XLA_FLAGS=--{YNN.name}={YNN.value}",
    ),
    Miscompile(
        ("39257", "40412"),
        ("cpu",),
        "jaxlib 0.10.2 from 7 dimensions, 0.11.0 from 8, on x86-64; 0.11.1 and later are right",
        "A product that is summed over one of 7 or more dimensions ends the process.",
        look_for_ynn_crash,
        f"import gpt_jax before the first array, or start with XLA_FLAGS=--{YNN.name}={YNN.value}",
    ),
    Miscompile(
        ("37234",),
        ("cpu", "gpu", "tpu"),
        "CPUs, from scores of about 2^30 on, up to jaxlib 0.12.0.1; tried here at 2^20",
        "The softmax of large scaled scores is NaN, because the scaling is rounded in one of two "
        "places only.",
        look_at_softmax,
        "take another version of jaxlib",
    ),
    Miscompile(
        ("40633",),
        ("gpu",),
        "jaxlib 0.11.0 and 0.11.1 on an RTX A6000 with CUDA 13; 0.10.2 is right",
        "Operators outside jit return wrong values: sqrt(512) is 0, ones(4) + 1 is 513.",
        look_at_operators,
        "take another version of jaxlib",
    ),
    Miscompile(
        ("39486",),
        ("gpu",),
        "jaxlib 0.10.2 and 0.11.0 on GPUs of compute capability 12.0 (sm_120)",
        "A Triton fusion with several outputs is silently wrong.",
        look_for_triton_fusion,
        "take a later jaxlib, or compile once with --config.compute.compiler_options="
        "xla_gpu_verify_triton_fusion_numerics=true and go on if it finds nothing",
    ),
)


def find_miscompiles(machine: Machine) -> list[str]:
    """A line for each fault of MISCOMPILES that is here."""
    lines = []
    # Whatever mesh the caller is in, the programs run on this one device.
    alone = jax.sharding.Mesh([machine.device], ("data",))
    with jax.set_mesh(alone), jax.default_device(machine.device):
        for fault in MISCOMPILES:
            if machine.device.platform not in fault.platforms:
                continue
            if seen := fault.look(machine):
                reports = " and ".join(f"jax#{number}" for number in fault.reports)
                lines.append(f"{reports}: {fault.symptom} Seen: {seen}. {fault.way_out}")
    return lines


def check_miscompiles(
    device: jax.Device,  # pyright: ignore[reportInvalidTypeForm] # It is a class.
    ignore: bool,
    folder: str = FOLDER,
) -> list[str]:
    """Looks for known faults of the compiler on `device`, unless it passed before.

    Returns a line for each fault that `ignore` lets pass. Raises Miscompiled for a fault without
    it. A `folder` that cannot be written makes no difference, but the programs run again at the
    next start.
    """
    machine = Machine(device, jaxlib.version.__version__)
    looked_for = [fault.reports for fault in MISCOMPILES]
    facts = [looked_for, Path(__file__).read_text(), jax.__version__, machine.jaxlib]
    facts += [device.device_kind, device.client.platform_version, gpt_jax.XLA_FLAGS]
    # A process that opened its devices before `import gpt_jax` goes without our flags, although
    # they stand in its environment. Only a program tells, and compiling it takes a moment.
    facts.append(JAX_CAME_FIRST and gives_sums_to_ynn(machine))
    path = Path(folder).expanduser() / f"no_miscompiles-{digest_json(*facts)}.txt"
    if path.exists():
        return []

    lines = find_miscompiles(machine)
    if lines and not ignore:
        raise Miscompiled(
            f"the compiler gives wrong results on this machine ({device.device_kind}): "
            + "; ".join(lines)
            + "; config.compute.ignore_miscompiles = true goes on all the same"
        )
    if not lines:
        _remember(path, f"{device.device_kind}, jaxlib {machine.jaxlib}\n")
    return [f"ignored, as config.compute.ignore_miscompiles says: {line}" for line in lines]


def _remember(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text.encode())
    except OSError:
        pass  # a home that cannot be written: the next start looks again


def make_page() -> str:
    """The page docs/miscompiles.md."""
    lines = [
        "# Known miscompiles",
        "",
        "This page is made from the table in `gpt_jax/hardware/miscompiles.py` by "
        "`python -m gpt_jax.hardware.miscompiles`. Do not edit it by hand; a test compares them.",
        "",
        "A compiler that computes wrong sums gives no error. Before a run, and before a checkpoint "
        "is used, each process looks for the faults below on its first device. What passed is "
        "remembered in `~/.cache/gpt_jax` for the versions, the kind of device and `XLA_FLAGS`.",
        "",
        "On two x86-64 cores the programs took 0.2 to 0.4 s of CPU time together, and 0.3 to 1.2 s "
        "while five other processes ran. The next start reads the file, which takes a "
        "millisecond. Where `import jax` comes before `import gpt_jax`, one program is "
        "compiled at each start (0.06 to 0.09 s). Only that tells which flags JAX has read.",
        "",
        "A fault that is found is named with its report, and the command ends with "
        "[exit code 32](launching.md#exit-codes). `--config.compute.ignore_miscompiles=true` "
        "goes on; `evaluate` and `generate` take `--ignore_miscompiles`.",
        "",
        "| report | platforms | seen by others | what goes wrong | looked for by |",
        "|---|---|---|---|---|",
    ]
    for fault in MISCOMPILES:
        reports = ", ".join(
            f"[jax#{number}](https://github.com/jax-ml/jax/issues/{number})"
            for number in fault.reports
        )
        platforms = " ".join(fault.platforms)
        how = (fault.look.__doc__ or "").strip()
        lines.append(f"| {reports} | {platforms} | {fault.reported} | {fault.symptom} | {how} |")
    lines += [
        "",
        f"On CPUs `import gpt_jax` sets `--{YNN.name}={YNN.value}` in `{NAME}` for jaxlib "
        f"{' and '.join(YNN.jaxlibs)}. That mends the first two. It works if gpt_jax is imported "
        "before JAX opens its first device.",
        "",
        "Scores beyond 2^30 are out of reach for a model in use, and a NaN ends a run as diverged. "
        "Attention here scales queries before the product, so nothing is left to fuse.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(make_page(), end="")
