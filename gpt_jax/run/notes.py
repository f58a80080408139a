"""The lines that a run prints before its first step."""

from functools import partial

import jax

from gpt_jax import config as configs, sharding
from gpt_jax.config import layer_specs
from gpt_jax.hardware import flops_per_token, peak_flops, peak_fp8_flops
from gpt_jax.model import MULTIPLIERS, count_params, measure_conformance
from gpt_jax.train import TrainState, describe_groups, find_frozen


def describe_unsharded(state: TrainState, mesh, zero: int) -> list[str]:
    """A line for each reason why devices of `mesh` hold arrays of over 1 MiB whole.

    `state` is abstract. Each array is named with its size.
    """
    by_reason: dict[str, list[str]] = {}
    for why, arrays in sharding.find_unsharded(state._asdict(), mesh).items():
        for path, size in arrays:
            kept = zero == 1 and path.startswith(("params/", "ema/"))
            reason = "config.mesh.zero = 1 cuts the optimiser's state alone" if kept else why
            by_reason.setdefault(reason, []).append(f"{path} {size / 2**20:.0f} MiB")

    return [
        f"on every device whole, although over 1 MiB, because {reason}: {', '.join(arrays)}"
        for reason, arrays in by_reason.items()
    ]


def describe_kernel(config: configs.Config, mesh, reason: str) -> str:
    """One line about the attention kernel, which is first compared with the reference on `mesh`.

    Raises UsageError if the results differ.
    """
    kernel = config.compute.kernel
    line = f"attention kernel: {kernel} ({reason})"
    if kernel == "reference":
        return line

    segments = config.data.document_mask
    errors = measure_conformance(
        kernel, config.model, config.compute.dtype, segments, sharding.row_parts(mesh)
    )
    line += (
        f"; differs from reference by {errors.values:.1e} on these devices, in gradients by "
        f"{errors.gradients:.1e}"
    )
    return f"{line}; attention has no segment leak" if segments else line


def describe_mesh(config: configs.Config, mesh) -> str:
    """One line: axes longer than 1 and how they are used, devices, processes."""
    compute = config.compute
    across = configs.cross_slice(config.mesh)

    def describe_axis(axis, size):
        slices = f" ({across[axis]} across slices)" if across[axis] > 1 else ""
        return f"{axis} {size}{slices}"

    axes = " x ".join(describe_axis(axis, size) for axis, size in mesh.shape.items() if size > 1)
    parts = [f"mesh: {axes or 'no axis longer than 1'}"]

    if config.mesh.zero != 3:
        parts.append(f"zero {config.mesh.zero}")
    if compute.shard_sequence and mesh.shape["tensor"] > 1:
        parts.append("the stream cut over tensor")
    stages = mesh.shape["pipeline"]
    if stages > 1:
        microbatches = format_count(compute.pipeline_microbatches or stages, "microbatch")
        rounds = format_count(compute.pipeline_rounds, "round")
        parts.append(f"{microbatches} through {stages} stages, {rounds}")

    devices = format_count(mesh.size, f"{mesh.devices.flat[0].device_kind} device")
    parts.append(f"{devices}, {format_count(jax.process_count(), 'process')}")
    return "; ".join(parts)


def describe_habits(config: configs.Config, mesh) -> str:
    """One line: how the platform of `mesh` computes what others compute in another way.

    Raises UsageError if the devices have no such matmul of experts as the config asks for.
    """
    device = mesh.devices.flat[0]
    habits = configs.find_habits(device.platform, device.device_kind)
    joins = habits.join_projections and MULTIPLIERS[config.compute.matmul_dtype].joins
    model = config.model
    rotates = habits.rotate_by_matmul and model.position == "rotary"
    rotates = rotates and config.compute.dtype == "bfloat16"
    habits = habits._replace(join_projections=joins, rotate_by_matmul=rotates)
    multiple = habits.split_heads
    if config.compute.matmul_dtype == "fp8" or (multiple and model.head_dim % multiple):
        habits = habits._replace(split_heads=0)
    has_experts = model.dispatch == "dropless" and configs.has_experts(model)
    if has_experts and config.compute.expert_matmul != "auto":
        habits = configs.choose_expert_matmul(
            config.compute.expert_matmul, habits, device.device_kind
        )
    has_exchange = has_experts and mesh.shape["expert"] > 1
    return configs.describe_habits(habits, has_experts, has_exchange)


def describe_lookup(config: configs.Config, mesh) -> list[str]:
    """A line about how tokens are embedded; [] if every device has all columns of the table.

    Batch shapes that follow each other may take different ways.
    """
    shape = dict(mesh.shape)
    ways = {}
    for train in configs.list_levels(config.train):
        sizes = configs.find_lookup_sizes(config, train, shape)
        if sizes is not None:
            way = configs.choose_embed_lookup(config.compute.embed_lookup, sizes)
            ways.setdefault(way, configs.count_lookup_bytes(sizes))

    def describe_way(way, counts):
        sent = ", ".join(f"{name} {count / 2**20:.3g} MiB" for name, count in counts.items())
        return f"{way} (a device sends for a microbatch: {sent})"

    texts = [describe_way(way, counts) for way, counts in ways.items()]
    return [f"embedding lookup: {', later '.join(texts)}"] if texts else []


def describe_fp8(config: configs.Config, platform: str, kind: str) -> list[str]:
    """Lines about matmuls in fp8 on a `kind` of device; [] for a config without them."""
    compute = config.compute
    if compute.matmul_dtype != "fp8":
        return []

    kept = "experts and " if configs.has_experts(config.model) else ""
    lines = [
        "fp8 matmuls: linear maps of attention and feed-forwards, one scale for each tensor of a "
        f"microbatch; {kept}all other matmuls are in {compute.dtype}, as are the weights that "
        "fsdp gathers and the texts that are generated; MFU is relative to the bf16 peak"
    ]
    if peak_fp8_flops(kind) is not None:
        return lines
    if platform == "cpu" or peak_flops(kind) is not None:
        lines.append(
            f"fp8 matmuls: {kind} has none, so XLA emulates them: the results are those of fp8, "
            "and the speed is not"
        )
    else:
        lines.append(
            f"fp8 matmuls: nobody knows whether {kind!r} has them or XLA emulates them, which is "
            "slow; add a row to gpt_jax/hardware/chips.py PEAKS"
        )
    return lines


def describe_dispatch(config: configs.Config) -> list[str]:
    """A line about experts that take only a part of a row; [] for any other model."""
    model = config.model
    if model.dispatch != "capacity" or not configs.has_experts(model):
        return []
    return [
        f"experts: each takes at most {model.capacity_factor:g} equal shares of a row, so what a "
        "token gets depends on the tokens before it in the row; text is generated dropless"
    ]


def describe_size(config: configs.Config) -> list[str]:
    """A line about the parameters."""
    counts = count_params(config.model)
    return [
        f"parameters: {counts['total']:,} ({counts['matmul']:,} multiplied, "
        f"{counts['embedding']:,} looked up); {describe_dtypes(config)}, "
        f"remat {configs.describe_remat(config.compute)}"
    ]


def describe_batches(config: configs.Config, sizes: configs.BatchSizes, done: int) -> list[str]:
    """A line about the tokens of a run that has `done` updates behind it.

    If batch sizes or row lengths follow, each has a line of its own, and so has one that the run
    never reaches.
    """
    train = config.train
    tokens = sizes.examples(train.steps) * train.seq_len
    parameters = count_params(config.model)["total"]
    total = f"{tokens:,} in all, {tokens / parameters:.3g} per parameter"
    begins = [done, *(level.step for level in sizes.levels if level.step > done)]
    ends = [*begins[1:], max(train.steps, begins[-1])]
    is_cut = any(pieces > 1 for _, pieces in sizes.shapes_from(done))
    if len(begins) == 1 or done >= train.steps:
        rows, tokens_here, microbatches = _describe_update(train, sizes.level(done), is_cut)
        cut = f", as {rows}" if is_cut else ""
        return [f"tokens: {tokens_here} a step{cut} in {microbatches}, {total}"]

    which = "batch shape" if is_cut else "batch size"
    lines = [
        f"tokens: {total}; the learning-rate schedule, evaluations and checkpoints go by steps, "
        f"and each {which} is a program that is compiled where it begins:"
    ]
    for begin, end in zip(begins, ends, strict=True):
        rows, tokens_here, microbatches = _describe_update(train, sizes.level(begin), is_cut)
        if begin >= train.steps:
            token = sizes.examples(begin) * train.seq_len
            lines.append(
                f"  {rows} from token {token:,} on: never reached, because "
                f"the run ends at token {tokens:,}"
            )
        else:
            last = min(end, train.steps)
            lines.append(
                f"  steps {begin + 1:,} to {last:,}: {rows}, {tokens_here} tokens a step in "
                f"{microbatches}"
            )
    return lines


def _describe_update(
    train: configs.Train, level: configs.Level, is_cut: bool
) -> tuple[str, str, str]:
    """(rows, tokens, microbatches) of an update.

    The length of the rows is told if `is_cut`, because then it changes inside the run.
    """
    here = configs.at_shape(train, level.size * level.pieces, train.seq_len // level.pieces)
    rows = format_count(here.batch_size, "row")
    if is_cut:
        rows += f" of {here.seq_len:,} tokens"
    tokens = f"{level.size * train.seq_len:,}"
    return rows, tokens, format_count(here.accumulate, "microbatch")


def describe_dtypes(config: configs.Config) -> str:
    """What is computed and kept in which dtype."""
    compute = config.compute
    if compute.dtype == "float32":
        return "float32 compute, parameters and sums"

    dtype = compute.gradient_dtype
    counts = [level.accumulate for level in configs.list_levels(config.train)]
    # A device adds up its own gradients of several microbatches in float32.
    if config.train.reduce_once and min(counts) > 1:
        dtype = "float32"
    elif config.train.reduce_once and max(counts) > 1 and dtype != "float32":
        dtype += ", and in float32 where an update has several microbatches"
    return (
        f"{compute.dtype} compute, float32 parameters, losses and optimiser; devices sum the "
        f"gradients of matmuls in {dtype}"
    )


def describe_optimizer(config: configs.Config, params_like, describe) -> list[str]:
    """A line for each group of parameters, and one about moments on the host."""
    about = config.model.balance_rate, find_frozen(config.train, params_like, describe)
    lines = [
        f"optimiser: {row.optimizer} for {row.group}: {format_count(row.tensors, 'tensor')}, "
        f"{row.parameters:,} parameters, peak rate {row.peak_rate:.3g}, decay {row.weight_decay:g}"
        for row in describe_groups(config.optim, params_like, describe, *about)
    ]
    if config.optim.layer_decay != 1:
        decay = config.optim.layer_decay
        lines.append(
            f"optimiser: layers have rates of their own: {decay ** (config.model.layers + 1):.3g} "
            f"of the peak at the input, {decay:g} in the last layer, all of it at the output"
        )
    if config.optim.state_memory == "host":
        lines.append(f"optimiser: moments lie in the host's memory ({sharding.HOST})")
    return lines


def format_count(number: int, what: str) -> str:
    """Writes a number with the right form of a word: "1 step", "2 processes"."""
    if number != 1:
        what += "es" if what.endswith(("s", "ch")) else "s"
    return f"{number:,} {what}"


def token_flops(config: configs.Config, matmul_params: int, length: int = 0) -> tuple[int, int]:
    """Training FLOPs of a token: full attention map, causal.

    Rows have `length` tokens, and config.train.seq_len of them if that is 0.
    """
    model = config.model
    flops = partial(
        flops_per_token,
        matmul_params,
        [spec.window for spec in layer_specs(model)],
        model.heads * model.head_dim,
        length or config.train.seq_len,
    )
    return flops(), flops(causal=True)
