"""What the GPU compiler makes of the kernel `flash`, and how long it takes where a GPU is at hand.

    python benchmarks/flash_programs.py                     all programs, compiled; writes the .json
    python benchmarks/flash_programs.py --print --cards=h100 --head_dims=64
    python benchmarks/flash_programs.py --table             the table in Markdown, from the file
    python benchmarks/flash_programs.py --time              flash and cudnn in turns, on a GPU

Compiling needs jax[cuda13] and no GPU. XLA compiles a gradient for the card, and ptxas tells the
registers of a thread and the bytes that it spills. Shared memory is what XLA launches with.
`--time` needs a GPU. It has not been run so far.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "benchmarks/flash_programs.json"
ARCHITECTURES = {"h100": "sm_90a", "b200": "sm_100a"}
ROWS, LENGTH, HEADS, KV_HEADS = 2, 2048, 8, 4
DTYPES = ("bfloat16", "float32")
# Soft-caps take more registers, so they are what is compiled. Windows take one comparison.
CAP, WINDOW = 50.0, 500


def make_gradient(name: str):
    """The gradient of (q, k, v, segment) through the kernel `name`."""
    import jax
    import jax.numpy as jnp

    from gpt_jax.model.attention.kernels import KERNELS
    from gpt_jax.model.attention.mask import Pattern

    def differentiate(q, k, v, segment, window=0, cap=0.0):
        def weigh(q, k, v):
            return (
                KERNELS[name]
                .run(q, k, v, Pattern(window, segment), cap, None)
                .astype(jnp.float32)
                .sum()
            )

        return jax.grad(weigh, (0, 1, 2))(q, k, v)

    return differentiate


def compile_gradient(card: str, head_dim: int, dtype: str) -> None:
    """Compiles a gradient for a card that is not here. XLA leaves its files where it is told."""
    from functools import partial

    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from gpt_jax.plan.targets import describe_card

    devices = topologies.get_topology_desc(
        platform="cuda",
        topology_name="programs",
        topology="1x1x1",
        target_config=describe_card(card),
    ).devices
    place = jax.sharding.SingleDeviceSharding(devices[0])

    def describe(shape, dtype):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=place)

    arrays = [
        describe((ROWS, LENGTH, heads, head_dim), dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    gradient = partial(make_gradient("flash"), window=WINDOW, cap=CAP)
    jax.jit(gradient).lower(*arrays, describe((ROWS, LENGTH), "int32")).compile()


def find_ptxas() -> Path:
    import nvidia

    found = [
        path
        for root in nvidia.__path__
        for path in Path(root).glob("*/bin/ptxas")
        if path.is_file()
    ]
    if not found:
        sys.exit("no ptxas under nvidia/*/bin: pip install 'jax[cuda13]'")
    return found[0]


def read_programs(folder: Path, card: str) -> dict:
    """{program: its figures}, of what XLA left in the folder."""
    launches = next(folder.glob("*thunk_sequence.txt")).read_text()
    shared = dict(re.findall(r"(flash_\w+) grid.*shared_memory: (\d+)", launches))

    programs = {}
    for path in folder.glob("*.ptx"):
        text = path.read_text()
        entry = re.search(r"\.entry (flash_\w+)", text)
        if entry is None:
            continue
        command = [find_ptxas(), "-v", f"-arch={ARCHITECTURES[card]}", path, "-o", os.devnull]
        told = subprocess.run(command, capture_output=True, text=True, check=True)
        words = told.stdout + told.stderr
        programs[entry[1]] = dict(
            registers=int(re.findall(r"Used (\d+) registers", words)[0]),
            spilled=int(re.findall(r"(\d+) bytes spill stores", words)[0]),
            shared=int(shared[entry[1]]),
            has_tensor_cores=bool(re.search(r"wgmma|tcgen05\.mma|mma\.sync", text)),
        )
    return programs


def make_row(card: str, head_dim: int, dtype: str) -> dict:
    """Compiles in a process of its own, because XLA reads its flags once."""
    with tempfile.TemporaryDirectory() as folder:
        environ = os.environ | {
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": f"--xla_dump_to={folder}",
            "JAX_PLATFORMS": "cpu",
            # It asks for a driver, which a machine without a GPU has not.
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        }
        command = [sys.executable, __file__, "--inside", card, str(head_dim), dtype]
        process = subprocess.run(command, env=environ, capture_output=True, text=True)
        if process.returncode:
            sys.exit(process.stderr)
        programs = read_programs(Path(folder), card)
    return dict(card=card, head_dim=head_dim, dtype=dtype, programs=programs)


def print_table(rows: list[dict]) -> None:
    names = ("flash_forward", "flash_backward_queries", "flash_backward_keys")
    print("| card | head_dim | dtype | forward | gradient of queries | of keys and values |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        cells = []
        for name in names:
            figures = row["programs"][name]
            cells.append(
                f"{figures['registers']}, {figures['spilled']} B, {figures['shared'] / 1024:.0f} KiB"
            )
        print(f"| {row['card']} | {row['head_dim']} | {row['dtype']} | {' | '.join(cells)} |")


def time_kernels(turns: int = 5, calls: int = 20) -> None:
    """Milliseconds of a gradient, flash and cudnn in turns, of packed rows and plain ones."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    if jax.default_backend() != "gpu":
        sys.exit("--time needs a GPU")
    rng = np.random.default_rng(0)
    for head_dim, length in ((64, 2048), (128, 2048), (128, 8192)):
        q, k, v = (
            jnp.asarray(rng.standard_normal((2, length, heads, head_dim)), jnp.bfloat16)
            for heads in (16, 8, 8)
        )
        documents = np.sort(rng.integers(1, 1 + length // 512, (2, length)), axis=1)
        for label, segment in (("plain", None), ("packed", jnp.asarray(documents, jnp.int32))):
            run = {name: jax.jit(make_gradient(name)) for name in ("flash", "cudnn")}
            times = {name: [] for name in run}
            for gradient in run.values():
                jax.block_until_ready(gradient(q, k, v, segment))
            for _ in range(turns):
                for name, gradient in run.items():
                    began = time.perf_counter()
                    for _ in range(calls):
                        result = gradient(q, k, v, segment)
                    jax.block_until_ready(result)
                    times[name].append((time.perf_counter() - began) / calls * 1e3)
            for name, took in times.items():
                print(
                    f"{jax.devices()[0].device_kind} head_dim {head_dim} length {length} {label} "
                    f"{name}: {np.median(took):.3f} ms ({min(took):.3f} to {max(took):.3f})"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cards", default=",".join(ARCHITECTURES))
    parser.add_argument("--head_dims", default="16,32,64,128,256")
    parser.add_argument("--print", action="store_true", help="write no file")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--inside", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()

    if args.inside:
        card, head_dim, dtype = args.inside
        return compile_gradient(card, int(head_dim), dtype)
    if args.table:
        return print_table(json.loads(FILE.read_text())["rows"])
    if args.time:
        return time_kernels()

    rows = [
        make_row(card, int(head_dim), dtype)
        for card in args.cards.split(",")
        for head_dim in args.head_dims.split(",")
        for dtype in DTYPES
    ]
    if args.print:
        print(json.dumps(rows))
    else:
        about = dict(batch=ROWS, length=LENGTH, heads=HEADS, kv_heads=KV_HEADS, softcap=CAP)
        FILE.write_text(json.dumps(about | dict(window=WINDOW, rows=rows), indent=1) + "\n")
        print_table(rows)


if __name__ == "__main__":
    main()
