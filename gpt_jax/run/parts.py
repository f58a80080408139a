"""What a run consists of: `build(config)` makes its parts, `start_state` its first state (floor
3; loop runs them)."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gpt_jax import config as configs, sharding
from gpt_jax.cluster import code_identity, describe_process_code, find_disagreements
from gpt_jax.data import Dataset, check_sizes, load_dataset, make_examples
from gpt_jax.errors import UsageError
from gpt_jax.evals import choose_prompts
from gpt_jax.hardware import (
    check_miscompiles,
    check_xla_options,
    choose_xla_options,
    describe_xla_options,
)
from gpt_jax.model import (
    Transformer,
    abstract_params,
    choose_kernel,
    count_params,
    describe_parameter,
    init_params,
    make_problem,
    measure_conformance,
)
from gpt_jax.run.notes import describe_mesh, format_count, unsharded
from gpt_jax.train import (
    Network,
    TrainState,
    describe_groups,
    eval_step,
    init_state,
    make_optimizer,
    make_zero1,
    train_step,
)


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


def make_network(model: configs.Model, compute: configs.Compute) -> Network:
    """The model as the pure functions that train/ works with."""
    module = Transformer(model, compute)

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
        describe_parameter,
    )


def resolve_kernel(
    model: configs.Model, compute: configs.Compute, seq_len: int, mesh, segments: bool
) -> tuple[configs.Compute, str]:
    """`compute` with a concrete attention kernel, and a line about the choice.

    The kernel is compared with the reference on this mesh first. Raises UsageError if none can
    do what the model asks, or if the results differ.
    """
    platform = mesh.devices.flat[0].platform
    problem = make_problem(model, compute.dtype, seq_len, platform, context=mesh.shape["context"])
    name, reason = choose_kernel(compute.kernel, problem)
    line = f"attention kernel: {name} ({reason})"
    if name != "reference":
        rows = sharding.row_parts(mesh)
        error = measure_conformance(name, model, compute.dtype, segments, rows)
        line += (
            f"; differs from reference by {error:.1e} on these devices"
            + ", no segment leak" * segments
        )
    return replace(compute, kernel=name), line


def build(config: configs.Config, say: Callable[[str], None] = print) -> Parts:
    """Everything a run needs, checked before anything long compiles. Raises UsageError for what
    cannot be run, and Miscompiled where the compiler is known to give wrong results."""
    configs.check(
        configs.resolve(config), jax.device_count()
    )  # before the data, which may take a while
    for line in check_miscompiles(jax.local_devices()[0], config.compute.ignore_miscompiles):
        say(line)
    data = load_dataset(config.data, say)
    if config.eval.compare_xz and not data.heldout:
        raise UsageError(
            "config.eval.compare_xz = True: needs held-out text, and the data holds none out; set "
            "it to "
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
        "the code": code_identity(),
    }
    found = find_disagreements(facts)
    if "the code" in found:  # what else differs may come of that
        raise UsageError(
            "the code (source digest and jax version): not the same on all processes of this job; "
            "install the "
            "same gpt_jax and jax on every host; this is "
            f"{describe_process_code(jax.process_index())}"
        ) from wrong
    if found:
        raise UsageError(
            f"{', '.join(found)}: not the same on all processes of this job; start them with the "
            "same flags "
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
        network = make_network(model, config.compute)
        like = abstract_params(model)
        tx = make_optimizer(
            config.optim,
            like,
            network.describe,
            jnp.dtype(config.compute.dtype),
            model.balance_rate,
        )

        def stored(params):
            return params

        if config.mesh.zero == 1:
            tx, stored = (
                make_zero1(tx, partial(sharding.lay_out_like, like=like), sharding.gather_fsdp),
                sharding.gather_fsdp,
            )

        def make_state():
            return init_state(stored(init_params(model, jax.random.key(seed))), tx, train)

        abstract = sharding.make_concrete(jax.eval_shape(make_state), mesh)

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
    return choose_xla_options(mesh.devices.flat[0].platform, config.compute.compiler_options)


def build_on(config: configs.Config, mesh, data: Dataset) -> Parts:
    """`build` for a resolved config on a given mesh."""
    train = config.train
    prompts = choose_prompts(config.model, data.tokenizer, config.eval)
    config = replace(config, eval=replace(config.eval, sample_prompts=prompts))
    with jax.set_mesh(mesh):
        model = config.model
        compute, line = resolve_kernel(
            model, config.compute, train.seq_len, mesh, config.data.document_mask
        )
        config = replace(config, compute=compute)
        options = compiler_options(config, mesh)
        check_xla_options(options, mesh)
        steps = make_steps(config, mesh)
        counts = count_params(model)
        notes = [
            describe_mesh(config, mesh),
            line,
            *([describe_xla_options(mesh.devices.flat[0].platform, options)] if options else ()),
            f"parameters: {counts['total']:,} ({counts['matmul']:,} multiplied, "
            f"{counts['embedding']:,} looked up); "
            f"{config.compute.dtype} compute, float32 parameters and sums, remat "
            f"{config.compute.remat}",
            f"tokens: {train.batch_size * train.seq_len:,} a step in "
            f"{format_count(train.accumulate, 'microbatch')}, "
            f"{train.batch_size * train.seq_len * train.steps:,} in all, "
            f"{train.batch_size * train.seq_len * train.steps / counts['total']:.3g} per parameter",
            *(
                f"optimiser: {row.optimizer} for {row.group}: "
                f"{format_count(row.tensors, 'tensor')}, {row.parameters:,} parameters, "
                f"peak rate {row.peak_rate:.3g}, decay {row.weight_decay:g}"
                for row in describe_groups(
                    config.optim, steps.abstract.params, describe_parameter, model.balance_rate
                )
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
