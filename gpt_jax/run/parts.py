"""What a run consists of: `build(config)` makes its parts, and run/loop.py runs them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax import config as configs, sharding
from gpt_jax.data import (
    Dataset,
    Examples,
    load_dataset,
    load_sets,
)
from gpt_jax.errors import UsageError
from gpt_jax.evals import check_labelled
from gpt_jax.hardware import (
    check_miscompiles,
    check_xla_options,
    choose_xla_options,
    describe_xla_options,
)
from gpt_jax.model import (
    ADAPTERS,
    Transformer,
    abstract_params,
    check_leaks,
    describe_parameter,
    init_params,
    number_layers,
)
from gpt_jax.run.adapters import choose_learned, make_merge
from gpt_jax.run.agreement import agree_on_job
from gpt_jax.run.convert import check_export
from gpt_jax.run.notes import (
    describe_dispatch,
    describe_fp8,
    describe_habits,
    describe_kernel,
    describe_lookup,
    describe_mesh,
    describe_optimizer,
    describe_size,
    describe_unsharded,
)
from gpt_jax.run.source import check_start, read_start_tokenizer, take_model
from gpt_jax.train import (
    Adapted,
    Network,
    TrainState,
    add_adapters,
    add_layer_rates,
    eval_step,
    find_frozen,
    hold,
    init_state,
    keep_on_host,
    make_optimizer,
    make_zero1,
    train_step,
)


class Parts(NamedTuple):
    """What a run consists of. The config is settled, see `settle`. The functions are jitted."""

    config: configs.Config
    mesh: jax.sharding.Mesh
    data: Dataset
    examples: Examples  # the rows of the training text, in the run's order
    init: Callable[[], TrainState]
    start: Callable[[Any], TrainState]  # see Steps
    abstract: TrainState  # shapes, dtypes and shardings of the state
    train_step: Callable  # see Steps
    eval_step: Callable
    base: Any  # see Steps, and so is `merge`
    merge: Callable
    notes: tuple[str, ...]  # what was chosen, and why
    frozen: Any = None  # what the loop gives to the steps under that name


def name_collections(params) -> dict[str, Any]:
    """The collections of a module's variables: the parameters, and adapters if they have some."""
    if isinstance(params, Adapted):
        return {"params": params.params, ADAPTERS: params.adapters}
    return {"params": params}


def make_network(model: configs.Model, compute: configs.Compute) -> Network:
    """The model as the pure functions that train/ works with."""
    module = Transformer(model, compute)

    def features(params, batch, key):
        return module.apply(
            name_collections(params),
            batch,
            rngs=None if key is None else {"dropout": key},
            method="features",
        )

    return Network(
        features,
        lambda params, dtype: module.apply(name_collections(params), dtype, method="output"),
        lambda head, hidden: module.apply({}, head, hidden, method="logits"),
        describe_parameter,
    )


def build(
    config: configs.Config,
    say: Callable[[str], None] = print,
    workdir: Path | None = None,
) -> Parts:
    """Everything a run needs, checked before anything long compiles.

    A run that may resume gives its `workdir`, see `read_start_tokenizer`.

    Raises UsageError for what cannot be run, and Miscompiled where the compiler is known to give
    wrong results.
    """
    config = take_model(config, workdir, say)
    # Loading the data may take a while, so what can be refused without it is refused first.
    resolved = configs.resolve(config)
    configs.check(resolved, jax.device_count())
    check_start(resolved, workdir)
    check_export(resolved)
    for line in check_miscompiles(jax.local_devices()[0], config.compute.ignore_miscompiles):
        say(line)

    data = load_dataset(config.data, say, read_start_tokenizer(config, workdir))
    check_heldout(config, data)

    vocab = data.tokenizer.vocab
    shape = configs.check(configs.resolve(config, vocab), jax.device_count(), vocab)
    mesh = sharding.make_mesh(shape, across=configs.cross_slice(config.mesh))
    return build_on(config, mesh, data, say)


def check_heldout(config: configs.Config, data: Dataset) -> None:
    """Raises UsageError for a field that goes by held-out text if the data has none."""
    check_labelled(config.eval.evaluators, data, "config.eval.evaluators")
    if data.heldout:
        return
    for field, value, off in (
        ("eval.compare_xz", config.eval.compare_xz, "false"),
        ("checkpoint.keep_best", config.checkpoint.keep_best, "0"),
    ):
        if value:
            raise UsageError(
                f"config.{field} = {value}: needs held-out text, and the data holds none out; set "
                f"it to {off}, or prepare with --eval_fraction"
            )


class Steps(NamedTuple):
    """What is compiled for a run: functions of abstract or real arrays on one mesh."""

    make_state: Callable[[], TrainState]
    # The first state, with given weights, which it donates. Under adapters it leaves them alone.
    start: Callable[[Any], TrainState]
    abstract: TrainState  # shapes, dtypes and shardings of the state
    # (state, batch, frozen=None) -> (state, Sums), which donates the state. `frozen` is a tree of
    # parameters on the same mesh, for an objective that wants one.
    train_step: Callable
    eval_step: Callable  # (params, batch, frozen=None) -> Sums
    base: Any  # shapes, dtypes and shardings of the weights beneath adapters; None without any
    merge: Callable  # (learned, frozen) -> the whole parameters


def make_steps(config: configs.Config, mesh) -> Steps:
    """The jitted functions of a resolved config whose kernel is a concrete one.

    No array is made, so the mesh may be of devices that are not there (`gpt-jax plan`).
    """
    train = config.train
    seed = config.seed
    options = compiler_options(config, mesh) or None
    with jax.set_mesh(mesh):
        model = config.model
        whole = abstract_params(model)
        like = jax.eval_shape(partial(choose_learned, config), whole)
        network = make_run_network(config)
        network = hold(network, find_frozen(train, like, network.describe))
        tx = make_run_optimizer(config, network, like)

        def start(params):
            learned = choose_learned(config, params)
            if config.mesh.zero == 1:
                learned = sharding.gather_fsdp(learned)
            return init_state(learned, tx, train)

        def make_state():
            return start(init_params(model, jax.random.key(seed)))

        # `frozen` is an argument and not a constant, so that it is sharded and lies in memory once.
        def update(state, batch, frozen=None):
            # Initialisation has the seed's own key.
            key = jax.random.fold_in(jax.random.key(seed), 1)
            # Each batch shape is a program of its own, with its own microbatches.
            here = configs.at_shape(train, *batch["tokens"].shape)
            return train_step(state, frozen or {}, batch, key, network=network, tx=tx, train=here)

        def measure(params, batch, frozen=None):
            return eval_step(params, frozen or {}, batch, network=network, train=train)

        abstract = sharding.make_concrete(jax.eval_shape(make_state), mesh)
        if config.optim.state_memory == "host":
            abstract = abstract._replace(opt=sharding.describe_on_host(abstract.opt))

        has_adapters = config.lora.rank > 0
        return Steps(
            jax.jit(make_state),
            jax.jit(start, donate_argnums=() if has_adapters else 0),
            abstract,
            jax.jit(update, donate_argnums=0, compiler_options=options),
            jax.jit(measure, compiler_options=options),
            sharding.make_concrete(whole, mesh) if has_adapters else None,
            make_merge(config.lora),
        )


def make_run_network(config: configs.Config) -> Network:
    """The network of a run, which has adapters if the config asks for them."""
    network = make_network(config.model, config.compute)
    return add_adapters(network, config.lora) if config.lora.rank else network


def make_run_optimizer(config: configs.Config, network: Network, like):
    """The optimiser of a run, laid out as its mesh and its memory want it.

    `like` is the tree of the parameters' shapes and layouts.
    """
    dtype = jnp.dtype(config.compute.dtype)
    frozen = find_frozen(config.train, like, network.describe)
    about = dtype, config.model.balance_rate, frozen
    tx = make_optimizer(config.optim, like, network.describe, *about)
    if config.optim.layer_decay != 1:
        tx = add_layer_rates(tx, find_layer_rates(config, like))

    if config.mesh.zero == 1:
        tx = make_zero1(tx, partial(sharding.lay_out_like, like=like), sharding.gather_fsdp)
    return keep_on_host(tx) if config.optim.state_memory == "host" else tx


def find_layer_rates(config: configs.Config, like) -> dict[str, Any]:
    """The part of the learning rate that each learned parameter has, by path.

    It is layer_decay to the power of the layers above it (Clark et al. 2020, arXiv:2003.10555). A
    stack of layers has a rate for each.
    """
    top = config.model.layers + 1

    def find_rate(path):
        matrix = path.rpartition("/")[0] if config.lora.rank else path
        return config.optim.layer_decay ** (top - np.asarray(number_layers(config.model, matrix)))

    leaves = jax.tree_util.tree_leaves_with_path(like)
    return {path: find_rate(path) for path in (sharding.join_path(keys) for keys, _ in leaves)}


def compiler_options(config: configs.Config, mesh) -> dict:
    """What the steps are compiled with on these devices."""
    device = mesh.devices.flat[0]
    return choose_xla_options(device.platform, device.device_kind, config.compute.compiler_options)


def build_on(
    config: configs.Config, mesh, data: Dataset, say: Callable[[str], None] = print
) -> Parts:
    """Does what `build` does, for a given mesh and loaded data."""
    data = load_sets(data, config.eval.sets, config.data, say)
    config, reason, examples = agree_on_job(config, mesh, data, say)
    leaks = (check_leaks(config.model),) if config.data.document_mask else ()
    device = mesh.devices.flat[0]
    with jax.set_mesh(mesh):
        check_xla_options(compiler_options(config, mesh), mesh)
        steps = make_steps(config, mesh)
        notes = (
            describe_mesh(config, mesh),
            describe_kernel(config, mesh, reason),
            *leaks,
            describe_habits(config, mesh),
            *describe_lookup(config, mesh),
            *describe_dispatch(config),
            *describe_fp8(config, device.platform, device.device_kind),
            *describe_options(config, mesh),
            *describe_size(config),
            *describe_optimizer(config, steps.abstract.params, make_run_network(config).describe),
            *describe_unsharded(steps.abstract, mesh, config.mesh.zero),
        )
    return Parts(config, mesh, data, examples, *steps, notes)


def describe_options(config: configs.Config, mesh) -> list[str]:
    """A line about the options that the steps are compiled with, if they have any."""
    options = compiler_options(config, mesh)
    device = mesh.devices.flat[0]
    return [describe_xla_options(device.platform, device.device_kind, options)] if options else []
