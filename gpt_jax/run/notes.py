"""The lines that a run prints before its first step."""

from functools import partial

import jax

from gpt_jax import config as configs, sharding
from gpt_jax.config import layer_specs
from gpt_jax.hardware import flops_per_token
from gpt_jax.train import TrainState


def unsharded(state: TrainState, mesh, zero: int) -> dict[str, list[str]]:
    """Why -> what every device of `mesh` holds whole of the abstract state and is over 1 MiB,
    with its size."""
    found: dict[str, list[str]] = {}
    for why, arrays in sharding.find_unsharded(state._asdict(), mesh).items():
        for path, size in arrays:
            kept = zero == 1 and path.startswith(("params/", "ema/"))
            reason = "config.mesh.zero = 1 cuts the optimiser's state alone" if kept else why
            found.setdefault(reason, []).append(f"{path} {size / 2**20:.0f} MiB")
    return found


def describe_mesh(config: configs.Config, mesh) -> str:
    """One line: axes longer than 1 and how they are used, devices, processes."""
    compute, across = config.compute, configs.cross_slice(config.mesh)

    def beyond(axis):
        return f" ({across[axis]} across slices)" if across[axis] > 1 else ""

    axes = " x ".join(
        f"{axis} {size}{beyond(axis)}" for axis, size in mesh.shape.items() if size > 1
    )
    used = [f"zero {config.mesh.zero}"] * (config.mesh.zero != 3)
    used += ["the stream cut over tensor"] * (compute.shard_sequence and mesh.shape["tensor"] > 1)
    if (stages := mesh.shape["pipeline"]) > 1:
        used += [
            format_count(compute.pipeline_microbatches or stages, "microbatch")
            + f" through {stages} stages, "
            + format_count(compute.pipeline_rounds, "round")
        ]
    return "; ".join(
        [
            f"mesh: {axes or 'no axis longer than 1'}",
            *used,
            f"{format_count(mesh.size, f'{mesh.devices.flat[0].device_kind} device')}, "
            + format_count(jax.process_count(), "process"),
        ]
    )


def format_count(number: int, what: str) -> str:
    """ "1 step", "2 processes" """
    return f"{number:,} {what}{'' if number == 1 else 'es' if what.endswith(('s', 'ch')) else 's'}"


def token_flops(config: configs.Config, matmul_params: int) -> tuple[int, int]:
    """Training FLOPs of a token: full attention map, causal."""
    model = config.model
    flops = partial(
        flops_per_token,
        matmul_params,
        [spec.window for spec in layer_specs(model)],
        model.heads * model.head_dim,
        config.train.seq_len,
    )
    return flops(), flops(causal=True)
