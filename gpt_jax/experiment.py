"""What a run consists of: `build(config)` makes its parts, `start_state` its first state (floor
3; loop runs them)."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gpt_jax import compiler, devices, evals, placing, sharding
from gpt_jax import config as configs
from gpt_jax.data import dataset
from gpt_jax.data.dataset import Dataset
from gpt_jax.data.pipeline import check_sizes, make_examples
from gpt_jax.errors import UsageError
from gpt_jax.model import kernels
from gpt_jax.model.transformer import (
    Transformer,
    abstract_params,
    count_params,
    init_params,
    layer_specs,
)
from gpt_jax.train import checkpoint
from gpt_jax.train.agreement import disagreements
from gpt_jax.train.loss import Network
from gpt_jax.train.optim import describe, make_optimizer, on_parts
from gpt_jax.train.step import TrainState, eval_step, init_state, train_step
from gpt_jax.version import same_code, whose_code


class Parts(NamedTuple):
    """What a run consists of. `config` is resolved; `init`, `train_step` and `eval_step` are
    jitted."""

    config: configs.Config
    mesh: jax.sharding.Mesh
    data: Dataset
    init: Callable[[], TrainState]
    abstract: TrainState  # shapes, dtypes and shardings of the state
    train_step: Callable  # (state, batch) -> (state, Sums); donates the state
    eval_step: Callable  # (params, batch) -> Sums
    notes: tuple[str, ...]  # what was chosen, and why


def make_network(model: configs.Model) -> Network:
    """The model as the pure functions that train/ works with."""
    module = Transformer(model)

    def features(params, batch, key):
        return module.apply(
            {"params": params},
            batch,
            rngs=None if key is None else {"dropout": key},
            method="features",
        )

    return Network(
        features,
        lambda params, dtype: module.apply({"params": params}, dtype, method="output"),
        lambda head, hidden: module.apply({}, head, hidden, method="logits"),
    )


def choose_kernel(
    model: configs.Model, seq_len: int, mesh, segments: bool
) -> tuple[configs.Model, str]:
    """The model with a concrete attention kernel, proved against the reference on this mesh, and
    a line about it."""
    name, reason = kernels.choose(
        model.kernel,
        kernels.problem(
            model, seq_len, mesh.devices.flat[0].platform, context=mesh.shape["context"]
        ),
    )
    line = f"attention kernel: {name} ({reason})"
    if name != "reference":
        rows = placing.row_parts(mesh)
        error = kernels.conformance(name, model, segments, rows)
        line += (
            f"; differs from reference by {error:.1e} on these devices"
            + ", no segment leak" * segments
        )
    return replace(model, kernel=name), line


def build(config: configs.Config, say: Callable[[str], None] = print) -> Parts:
    """Everything a run needs, checked before anything long compiles. Raises UsageError for what
    cannot be run."""
    configs.check(
        configs.resolve(config), jax.device_count()
    )  # before the data, which may take a while
    data = dataset.load(config.data, say)
    if config.eval.compare_xz and not data.heldout:
        raise UsageError(
            "config.eval.compare_xz = True: needs held-out text, and the data holds none out; set it to "
            "false, or prepare with --eval_fraction"
        )
    vocab = data.tokenizer.vocab
    config = configs.resolve(config, vocab)
    mesh = sharding.make_mesh(
        configs.check(config, jax.device_count(), vocab), across=configs.cross_slice(config.mesh)
    )
    check_job(config, data)
    return build_on(config, mesh, data)


LOCAL = (
    "data.path",
    "data.source_paths",
    "data.eval_path",
    "data.cache",
    "data.workers",
    "data.prefetch",
    "data.threads",
    "log.progress",
)


def check_job(config: configs.Config, data: Dataset) -> None:
    """Raises UsageError on all processes when they were started with different configs or texts:
    each would train what it was given, and what counts as replicated would quietly differ. LOCAL
    keys may; the text itself is compared, and so are the counts of the mixture, which come of
    floats. Also for text and settings that make no rows."""
    wrong = None
    try:
        examples = make_examples(data, config.data, config.train.seq_len, config.seed)
        check_sizes(examples, config.train.batch_size)
        counts = examples.mix and [examples.mix.counts.tolist(), examples.mix.begins.tolist()]
    except UsageError as error:  # raised once the others know: they wait below
        wrong, counts = error, str(error)
    facts = {
        f"config.{key}": value for key, value in configs.flatten(config).items() if key not in LOCAL
    }
    facts |= {
        "the text": data.content,
        "the tokenizer": data.tokenizer.fingerprint,
        "the mixture's counts": counts,
        "the code": same_code(),
    }
    found = disagreements(facts)
    if "the code" in found:  # what else differs may come of that
        raise UsageError(
            "the code (source digest and jax version): not the same on all processes of this job; install the "
            f"same gpt_jax and jax on every host; this is {whose_code(jax.process_index())}"
        ) from wrong
    if found:
        raise UsageError(
            f"{', '.join(found)}: not the same on all processes of this job; start them with the same flags "
            "and the same text"
        ) from wrong
    if wrong:
        raise wrong


class Steps(NamedTuple):
    """What is compiled for a run: functions of abstract or real arrays on one mesh."""

    make_state: Callable[[], TrainState]
    abstract: TrainState  # shapes, dtypes and shardings of the state
    train_step: Callable  # (state, batch) -> (state, Sums); donates the state
    eval_step: Callable  # (params, batch) -> Sums


def make_steps(config: configs.Config, mesh) -> Steps:
    """The jitted functions of a resolved config whose kernel is a concrete one. Makes no array:
    the mesh may be of devices that are not there (`gpt-jax plan`)."""
    train, seed = config.train, config.seed
    options = compiler_options(config, mesh) or None
    with jax.set_mesh(mesh):
        model = config.model
        network = make_network(model)
        like = abstract_params(model)
        tx = make_optimizer(config.optim, like, jnp.dtype(model.dtype), model.balance_rate)

        def stored(params):
            return params

        if config.mesh.zero == 1:
            tx, stored = (
                on_parts(tx, partial(sharding.lay_out, like=like), sharding.whole),
                sharding.whole,
            )

        def make_state():
            return init_state(stored(init_params(model, jax.random.key(seed))), tx, train)

        abstract = sharding.concrete(jax.eval_shape(make_state), mesh)

        def key():
            return jax.random.fold_in(jax.random.key(seed), 1)  # init has the seed's own key

        step = jax.jit(
            lambda state, batch: train_step(
                state, batch, key(), network=network, tx=tx, train=train
            ),
            donate_argnums=0,
            compiler_options=options,
        )
        return Steps(
            jax.jit(make_state),
            abstract,
            step,
            jax.jit(partial(eval_step, network=network, train=train), compiler_options=options),
        )


def compiler_options(config: configs.Config, mesh) -> dict:
    """What the steps are compiled with on these devices."""
    return compiler.options(mesh.devices.flat[0].platform, config.train.compiler_options)


def build_on(config: configs.Config, mesh, data: Dataset) -> Parts:
    """`build` for a resolved config on a given mesh."""
    train = config.train
    prompts = evals.sample_prompts(config.model, data.tokenizer, config.eval)
    config = replace(config, eval=replace(config.eval, sample_prompts=prompts))
    with jax.set_mesh(mesh):
        model, line = choose_kernel(config.model, train.seq_len, mesh, config.data.apart)
        config = replace(config, model=model)
        options = compiler_options(config, mesh)
        compiler.check(options, mesh)
        steps = make_steps(config, mesh)
        counts = count_params(model)
        notes = [
            describe_mesh(config, mesh),
            line,
            *([compiler.describe(mesh.devices.flat[0].platform, options)] if options else ()),
            f"parameters: {counts['total']:,} ({counts['matmul']:,} multiplied, {counts['embedding']:,} looked up); "
            f"{model.dtype} compute, float32 parameters and sums, remat {model.remat}",
            f"tokens: {train.batch_size * train.seq_len:,} a step in {count(train.accumulate, 'microbatch')}, "
            f"{train.batch_size * train.seq_len * train.steps:,} in all, "
            f"{train.batch_size * train.seq_len * train.steps / counts['total']:.3g} per parameter",
            *(
                f"optimiser: {row.optimizer} for {row.group}: {count(row.tensors, 'tensor')}, {row.parameters:,} parameters, "
                f"peak rate {row.peak_rate:.3g}, decay {row.weight_decay:g}"
                for row in describe(config.optim, steps.abstract.params, model.balance_rate)
            ),
            *(
                f"on every device whole, although over 1 MiB, because {why}: {', '.join(paths)}"
                for why, paths in unsharded(steps.abstract, mesh, config.mesh.zero).items()
            ),
        ]
        return Parts(
            config,
            mesh,
            data,
            steps.make_state,
            steps.abstract,
            steps.train_step,
            steps.eval_step,
            tuple(notes),
        )


def unsharded(state: TrainState, mesh, zero: int) -> dict[str, list[str]]:
    """Why -> what every device of `mesh` holds whole of the abstract state and is over 1 MiB,
    with its size."""
    found: dict[str, list[str]] = {}
    for why, arrays in sharding.unsharded(state._asdict(), mesh).items():
        for path, size in arrays:
            kept = zero == 1 and path.startswith(("params/", "ema/"))
            reason = "config.mesh.zero = 1 cuts the optimiser's state alone" if kept else why
            found.setdefault(reason, []).append(f"{path} {size / 2**20:.0f} MiB")
    return found


def describe_mesh(config: configs.Config, mesh) -> str:
    """One line: axes longer than 1 and how they are used, devices, processes."""
    model, across = config.model, configs.cross_slice(config.mesh)

    def beyond(axis):
        return f" ({across[axis]} across slices)" if across[axis] > 1 else ""

    axes = " x ".join(
        f"{axis} {size}{beyond(axis)}" for axis, size in mesh.shape.items() if size > 1
    )
    used = [f"zero {config.mesh.zero}"] * (config.mesh.zero != 3)
    used += ["the stream cut over tensor"] * (model.shard_sequence and mesh.shape["tensor"] > 1)
    if (stages := mesh.shape["pipeline"]) > 1:
        used += [
            count(model.pipeline_microbatches or stages, "microbatch")
            + f" through {stages} stages, "
            + count(model.pipeline_rounds, "round")
        ]
    return "; ".join(
        [
            f"mesh: {axes or 'no axis longer than 1'}",
            *used,
            f"{count(mesh.size, f'{mesh.devices.flat[0].device_kind} device')}, "
            + count(jax.process_count(), "process"),
        ]
    )


def count(number: int, what: str) -> str:
    """ "1 step", "2 processes" """
    return f"{number:,} {what}{'' if number == 1 else 'es' if what.endswith(('s', 'ch')) else 's'}"


def saved_config(meta: dict) -> configs.Config:
    """The Config a checkpoint was written with."""
    return configs.from_dict(meta["config"])


def check_resume(parts: Parts, meta: dict, directory: Path, say) -> None:
    """Reports every changed key; UsageError when one of them changes what the saved arrays mean."""
    found = configs.changes(saved_config(meta), parts.config)
    for key, old, new, may in found:
        say(
            f"config.{key} changed since the checkpoint: {old!r} -> {new!r}"
            + ("" if may else " (not possible)")
        )
    blocked = [
        f"config.{key} ({old!r} there, {new!r} now)" for key, old, new, may in found if not may
    ]
    if blocked:
        raise UsageError(
            f"{directory.parent} holds a run with another {', '.join(blocked)}; use its values or another "
            "--workdir"
        )
    if meta["tokenizer"] != parts.data.tokenizer.to_json():
        raise UsageError(
            f"{directory.parent} holds a run with another tokenizer: the text it is made from has changed; "
            "give the same text or another --workdir"
        )
    if meta["data"]["content"] != parts.data.content:
        raise UsageError(
            f"{directory.parent} holds a run on another text than {parts.config.data.where} now; give the same "
            "text or another --workdir"
        )


def start_state(parts: Parts, checkpoints, say) -> TrainState:
    """The state of the newest valid checkpoint, or a fresh one."""
    step = checkpoints.latest
    if step is None:
        return parts.init()
    check_resume(
        parts, checkpoint.read_meta(checkpoints.directory, step), checkpoints.directory, say
    )
    loaded = checkpoint.restore(checkpoints.directory, step, items(parts.abstract))
    say(f"resumed from step {step} of {checkpoints.directory}")
    return loaded["train"]._replace(
        params=loaded["params"], ema=loaded["ema"] if "ema" in loaded else {}
    )


def items(state: TrainState) -> dict[str, Any]:
    """The state as the items of a checkpoint; `ema` only where the run keeps averages."""
    parts = {"params": state.params, "train": state._replace(params={}, ema={})}
    return parts | ({"ema": state.ema} if state.ema else {})


def token_flops(config: configs.Config, matmul_params: int) -> tuple[int, int]:
    """Training FLOPs of a token: full attention map, causal."""
    model = config.model
    flops = partial(
        devices.flops_per_token,
        matmul_params,
        [spec.window for spec in layer_specs(model)],
        model.heads * model.head_dim,
        config.train.seq_len,
    )
    return flops(), flops(causal=True)
