"""Which options of the TPU compiler make its own count of cycles smaller, and what they cost.

    python benchmarks/tpu_options.py               every row that benchmarks/tpu_options.json lacks
    python benchmarks/tpu_options.py --anew        every row again
    python benchmarks/tpu_options.py --only=v5p    rows whose name has that in it
    python benchmarks/tpu_options.py --table       the tables in Markdown, from the file

It needs the extra plan (pip install 'gpt_jax[plan]') and no accelerator. All compile one at a time,
and the seconds are CPU seconds, because those of the clock depend on what else the machine does.

- "matmuls" are three matmuls of a SwiGLU layer at limits of the memory beside the matrix units.
- "layer" is that layer forward and backward, without a limit and with the one that is shipped.
  A row of either takes 5 to 60 s of CPU time, and more at limits above 65,536.
- "scan" is four layers on 16 devices (data 2, fsdp 8) with options of collectives. A row takes
  about 20 s of CPU time.

Whole steps are those of tpu_steps.py.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tpu_tables import format_programs, format_scans

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "benchmarks/tpu_options.json"

LIMIT = "xla_tpu_scoped_vmem_limit_kib"
LIMITS = ("default", "32768", "49152", "65536", "98304", "114688")
# generation -> (slice for one device, slice of 16 devices)
MACHINES = {
    "v5e": ("v5e:2x2", "v5e:4x4"),
    "v5p": ("v5p:2x2x1", "v5p:2x2x4"),
    "v6e": ("v6e:2x2", "v6e:4x4"),
    "TPU7x": ("TPU7x:2x2x1", "TPU7x:2x2x2"),
}
# The limits that gpt_jax/hardware/xla_options.py takes.
CHOSEN = {"v5e": "49152", "v5p": "32768", "v6e": "98304", "TPU7x": "49152"}
TOKENS, EMBED, MLP = 16384, 4096, 14336

# Collectives on the SparseCore, with the options that MaxText's recipe for v6e sets.
SPARSE_ALL_REDUCE = (
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce=true",
    "xla_tpu_enable_all_reduce_offload_tracing=true",
    "xla_tpu_use_tc_device_shape_on_sc=true",
    "xla_sc_disable_megacore_partitioning=true",
)
SPARSE_ALL = (
    *SPARSE_ALL_REDUCE,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather=false",
    "xla_tpu_enable_sparse_core_collective_offload_all_gather=true",
    "xla_tpu_enable_all_gather_offload_tracing=true",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter=true",
    "xla_tpu_enable_reduce_scatter_offload_tracing=true",
)
ASYNC_ALL_REDUCE = (
    "xla_enable_async_all_reduce=true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce=true",
)
PIPELINING = ("xla_tpu_enable_ag_backward_pipelining=true",)
# What a scan of layers over 16 devices is compiled with, by name.
COLLECTIVES = {
    "as shipped": (),
    "all collectives on the SparseCore": SPARSE_ALL,
    "sums on the SparseCore": SPARSE_ALL_REDUCE,
    "asynchronous sums": ASYNC_ALL_REDUCE,
    "gathers of the backward pass pipelined": PIPELINING,
}
WITH_SPARSE_CORE = ("v6e", "v5p")


def multiply(x, w):
    """The forward matmul of a layer, x[16384, 4096] @ w[4096, 14336]."""
    return x @ w


def differentiate(dy, down, gate, up):
    """The gradients of gate and up, after the matmul with the down projection's weights."""
    import jax

    d_hidden = jax.lax.dot_general(dy, down, (((1,), (1,)), ((), ())))
    _, pull_back = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, gate, up)
    return pull_back(d_hidden)


def differentiate_weights(x, dy):
    """The gradient of w in `multiply`."""
    import jax

    return jax.lax.dot_general(x, dy, (((0,), (0,)), ((), ())))


def differentiate_layer(x, gate, up, down, dy):
    """The layer's result and all its gradients, in nine matmuls."""
    import jax

    def apply(x, gate, up, down):
        return (jax.nn.silu(x @ gate) * (x @ up)) @ down

    y, pull_back = jax.vjp(apply, x, gate, up, down)
    return y, pull_back(dy)


# name -> (function, shapes of its arguments in bfloat16)
MATMULS = {
    "forward": (multiply, ((TOKENS, EMBED), (EMBED, MLP))),
    "swiglu_backward": (
        differentiate,
        ((TOKENS, EMBED), (MLP, EMBED), (TOKENS, MLP), (TOKENS, MLP)),
    ),
    "weight_gradient": (differentiate_weights, ((TOKENS, EMBED), (TOKENS, MLP))),
}
LAYER = {
    "layer": (
        differentiate_layer,
        ((TOKENS, EMBED), (EMBED, MLP), (EMBED, MLP), (MLP, EMBED), (TOKENS, EMBED)),
    ),
}
PROGRAMS = {"matmuls": MATMULS, "layer": LAYER}


def compile_programs(kind: str, generation: str, limit: str) -> dict:
    """Compiles the programs of a kind in this process, which must be fresh."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from gpt_jax.commands.compiling import ENVIRONMENT
    from gpt_jax.hardware import choose_xla_options
    from gpt_jax.plan.compiled import list_devices
    from gpt_jax.plan.program.program import read_program
    from gpt_jax.plan.topology import parse_topology

    os.environ.update(ENVIRONMENT)
    topology = parse_topology(MACHINES[generation][0])
    place = NamedSharding(Mesh(list_devices(topology)[:1], ("data",)), PartitionSpec())
    texts = () if limit == "default" else (f"{LIMIT}={limit}",)
    options = choose_xla_options("tpu", "", texts)

    rows = {}
    for name, (function, shapes) in PROGRAMS[kind].items():
        given = [jax.ShapeDtypeStruct(dims, jnp.bfloat16, sharding=place) for dims in shapes]
        lowered = jax.jit(function, compiler_options=options).lower(*given)
        began = time.process_time()
        text = lowered.compile().as_text()
        seconds = time.process_time() - began

        program = read_program(text, {"data": 1})
        device_seconds = program.cycles / topology.chip.clock
        rows[name] = {
            "cycles": program.cycles,
            "milliseconds": round(1e3 * device_seconds, 3),
            "of_peak": round(program.matmul_flops / device_seconds / topology.peak, 3),
            "compile_cpu_seconds": round(seconds, 1),
        }
    return rows


def scan_layers(first, second, x):
    """The loss of four layers and their updated weights, [4, 2048, 8192] and [4, 8192, 2048]."""
    import jax
    import jax.numpy as jnp

    def compute_loss(weights, x):
        def apply(x, layer):
            return x + jax.nn.silu(x @ layer[0]) @ layer[1], None

        y, _ = jax.lax.scan(apply, x, weights)
        return jnp.mean(y.astype(jnp.float32) ** 2)

    weights = (first, second)
    loss, gradients = jax.value_and_grad(compute_loss)(weights, x)
    return loss, jax.tree.map(lambda w, dw: w - 0.1 * dw, weights, gradients)


def compile_scan(generation: str, name: str) -> dict:
    """Compiles `scan_layers` on data 2, fsdp 8 in this process, which must be fresh."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

    from gpt_jax.commands.compiling import ENVIRONMENT
    from gpt_jax.hardware import choose_xla_options
    from gpt_jax.plan.compiled import list_devices
    from gpt_jax.plan.program.program import read_program
    from gpt_jax.plan.topology import parse_topology

    os.environ.update(ENVIRONMENT)
    topology = parse_topology(MACHINES[generation][1])
    devices = np.array(list_devices(topology)).reshape(2, 8)
    mesh = Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    places = [
        NamedSharding(mesh, spec)
        for spec in (P(None, "fsdp"), P(None, None, "fsdp"), P(("data", "fsdp")))
    ]
    dims = ((4, 2048, 8192), (4, 8192, 2048), (4096 * 16, 2048))
    given = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)
        for shape, place in zip(dims, places, strict=True)
    ]
    options = choose_xla_options("tpu", "", COLLECTIVES[name])
    results = (NamedSharding(mesh, P()), tuple(places[:2]))
    lowered = jax.jit(scan_layers, compiler_options=options, out_shardings=results).lower(*given)
    began = time.process_time()
    text = lowered.compile().as_text()
    seconds = time.process_time() - began

    program = read_program(text, dict(mesh.shape))
    moved = {True: 0, False: 0}
    for row in program.collectives:
        moved[row.asynchronous] += row.bytes * row.calls
    return {
        "cycles": program.cycles,
        "computing_milliseconds": round(1e3 * program.cycles / topology.chip.clock, 3),
        "hidden_bytes": moved[True],
        "open_bytes": moved[False],
        "compile_cpu_seconds": round(seconds, 1),
    }


def run_child(command: list[str]) -> tuple[str, str]:
    """Returns (standard output, the last line of complaints) of a command."""
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    complaints = child.stderr.strip().splitlines() or [""]
    return child.stdout, complaints[-1][:400]


def make_program_row(kind: str, generation: str, limit: str) -> dict:
    """Measures one limit. The row has `error` if the compiler refuses it."""
    command = [sys.executable, __file__, f"--inside={kind},{generation},{limit}"]
    answer, complaint = run_child(command)
    lines = answer.strip().splitlines()
    row: dict = {"kind": kind, "generation": generation, "limit": limit}
    return row | ({"programs": json.loads(lines[-1])} if lines else {"error": complaint})


def make_scan_row(generation: str, name: str) -> dict:
    """Compiles the scan with options. The row has `error` if the compiler refuses them."""
    command = [sys.executable, __file__, f"--inside=scan,{generation},{name}"]
    answer, complaint = run_child(command)
    lines = answer.strip().splitlines()
    row: dict = {"kind": "scan", "generation": generation, "name": name}
    row["options"] = list(COLLECTIVES[name])
    return row | (json.loads(lines[-1]) if lines else {"error": complaint})


def list_rows() -> dict[str, tuple]:
    """Returns what is measured by the name of its row: (function, generation, limit or options)."""
    rows = {
        f"matmuls {generation} {limit}": (make_program_row, "matmuls", generation, limit)
        for generation in MACHINES
        for limit in LIMITS
    }
    for generation, limit in CHOSEN.items():
        for one in ("default", limit):
            rows[f"layer {generation} {one}"] = make_program_row, "layer", generation, one
    for generation in WITH_SPARSE_CORE:
        for name in COLLECTIVES:
            rows[f"scan {generation} {name}"] = make_scan_row, generation, name
    return rows


def format_tables(rows: dict) -> list[str]:
    """Returns the tables of the page, with the rows in order."""
    ordered = {key: rows[key] for key in list_rows() if key in rows}
    matmuls = format_programs(
        ordered, "matmuls", "forward | SwiGLU backward | weight gradient | together"
    )
    layer = format_programs(ordered, "layer", "SwiGLU layer, both ways")
    return [*matmuls, "", *layer, "", *format_scans(ordered)]


def read_rows() -> dict:
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--only", default="")
    flags.add_argument("--anew", action="store_true")
    flags.add_argument("--table", action="store_true")
    flags.add_argument("--inside", help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.inside:
        kind, *words = args.inside.split(",")
        made = compile_scan(*words) if kind == "scan" else compile_programs(kind, *words)
        print(json.dumps(made))
        return
    if args.table:
        print("\n".join(format_tables(read_rows())))
        return

    wanted = {key: row for key, row in list_rows().items() if args.only in key}
    if not wanted:
        raise SystemExit(f"--only={args.only}: no row has that in its name")
    for key, (make, *words) in wanted.items():
        if args.anew or key not in read_rows():
            row = make(*words)
            FILE.write_text(json.dumps(read_rows() | {key: row}, indent=1) + "\n")
            print(key, row.get("error", "done"), flush=True)


if __name__ == "__main__":
    main()
