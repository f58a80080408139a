"""What embeddings cost by tables and by columns on TPUs, as the compiler counts it.

    python benchmarks/tpu_lookup.py                every row that benchmarks/tpu_lookup.json lacks
    python benchmarks/tpu_lookup.py --only=v5p     rows whose name has that in it, anew
    python benchmarks/tpu_lookup.py --table        the table in Markdown, from the file

It needs the extra plan (pip install 'gpt_jax[plan]') and no accelerator. A row takes 20 s to 3
minutes of CPU time.

A row has two programs: the lookup of an embedding alone, and its gradient. Each device has `tokens`
tokens in bfloat16. The compiler gives no cycles for collectives, gathers and scatters, so they are
missing in the cycles. What is sent is counted by gpt_jax/plan/program/.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "benchmarks/tpu_lookup.json"
WAYS = ("tables", "columns")
MIB = 2**20


class Case(NamedTuple):
    """A lookup on a machine whose devices all lie along fsdp."""

    machine: str
    vocab: int
    embed: int
    tokens: int


CASES = {
    "llama:8b on 16 v5p": Case("v5p:2x2x4", 128_256, 4096, 8192),
    "llama:8b on 16 v5e": Case("v5e:4x4", 128_256, 4096, 8192),
    "letters on 16 v5e": Case("v5e:4x4", 256, 1024, 8192),
}


def compile_lookup(name: str, way: str) -> dict:
    """Compiles a lookup and its gradient in this process, which must be fresh."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec as P

    from gpt_jax import sharding
    from gpt_jax.commands.compiling import ENVIRONMENT
    from gpt_jax.hardware import choose_xla_options
    from gpt_jax.model.layers.embed import lookup
    from gpt_jax.plan.compiled import list_devices
    from gpt_jax.plan.program.program import read_program
    from gpt_jax.plan.topology import parse_topology

    os.environ.update(ENVIRONMENT)
    case = CASES[name]
    topology = parse_topology(case.machine)
    mesh = sharding.make_mesh({"fsdp": topology.devices}, list_devices(topology))
    rows = sharding.batch_spec()
    stored = sharding.make_spec(sharding.STORED, ("vocab", "embed"))

    def shape(dims, dtype, spec):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, spec))

    given = (
        shape((case.vocab, case.embed), jnp.float32, stored),
        shape((mesh.size, case.tokens), jnp.int32, rows),
        shape((mesh.size, case.tokens, case.embed), jnp.bfloat16, P(*rows, None)),
    )

    def look_up(table, tokens, _):
        return lookup(table, tokens, jnp.bfloat16, way)

    def differentiate(table, tokens, gradient):
        _, pull_back = jax.vjp(lambda table: look_up(table, tokens, None), table)
        return pull_back(gradient)[0]

    options = choose_xla_options("tpu", topology.chip.kind, ())
    sent: dict[str, float] = {}
    cycles = 0
    temporary = 0
    for function in (look_up, differentiate):
        with jax.set_mesh(mesh):
            program = jax.jit(function, compiler_options=options).lower(*given).compile()
        counted = read_program(program.as_text(), dict(mesh.shape))
        cycles += counted.cycles
        temporary = max(temporary, program.memory_analysis().temp_size_in_bytes)
        for row in counted.collectives:
            sent[row.kind] = sent.get(row.kind, 0) + row.bytes * row.calls
    return {
        "sent_mib": {kind: round(size / MIB, 1) for kind, size in sent.items()},
        "cycles": cycles,
        "temporary_mib": round(temporary / MIB),
    }


def format_table(results: dict) -> str:
    """The rows of a file as Markdown."""
    lines = [
        "| embedding | way | sent, MiB | temporaries, MiB | cycles of all else |",
        "|---|---|---|---|---|",
    ]
    for name, ways in results.items():
        for way, row in ways.items():
            kinds = ", ".join(f"{kind} {size:,}" for kind, size in row["sent_mib"].items())
            lines.append(
                f"| {name} | {way} | {kinds} | {row['temporary_mib']:,} | {row['cycles']:,} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.one:
        print(json.dumps(compile_lookup(*flags.one)))
        return

    results = json.loads(FILE.read_text()) if FILE.exists() else {}
    if flags.table:
        print(format_table(results))
        return
    for name in CASES:
        if flags.only not in name or (name in results and not flags.only):
            continue
        ways = {}
        for way in WAYS:
            command = [sys.executable, __file__, "--one", name, way]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            ways[way] = json.loads(output.splitlines()[-1])
            print(f"{name}, {way}: {ways[way]}", flush=True)
        results[name] = ways
        FILE.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
