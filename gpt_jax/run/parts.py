"""What a run consists of: `build(config)` makes its parts, and run/loop.py runs them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gpt_jax import config as configs, sharding
from gpt_jax.cluster import code_identity, describe_process_code, find_disagreements
from gpt_jax.data import (
    Dataset,
    Examples,
    check_sizes,
    load_dataset,
    load_sets,
    make_examples,
)
from gpt_jax.errors import UsageError
from gpt_jax.evals import (
    check_labelled,
    check_questions,
    check_set_names,
    choose_prompts,
    find_questions,
)
from gpt_jax.files import digest_file
from gpt_jax.hardware import (
    check_miscompiles,
    check_xla_options,
    choose_xla_options,
    describe_xla_options,
)
from gpt_jax.model import (
    Transformer,
    abstract_params,
    check_leaks,
    choose_kernel,
    describe_parameter,
    init_params,
    make_problem,
)
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
    Network,
    TrainState,
    eval_step,
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
    start: Callable[[Any], TrainState]  # the first state, with given parameters, which it donates
    abstract: TrainState  # shapes, dtypes and shardings of the state
    train_step: Callable  # see Steps
    eval_step: Callable
    notes: tuple[str, ...]  # what was chosen, and why
    frozen: Any = None  # what the loop gives to the steps under that name


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


def choose_run_kernel(
    model: configs.Model,
    compute: configs.Compute,
    seq_len: int,
    packed: bool,
    mesh,
    length_ramp: tuple[tuple[int, int], ...] = (),
) -> tuple[str, str]:
    """The attention kernel of a run on this mesh, and the reason for it.

    `packed` says whether documents of a row are kept apart.

    Raises UsageError if no kernel can do what the model asks, if the requested one cannot, or if
    it cannot take a row length of the ramp.
    """
    platform = mesh.devices.flat[0].platform
    problem = make_problem(
        model, compute.dtype, seq_len, platform, context=mesh.shape["context"], packed=packed
    )
    return choose_kernel(compute.kernel, problem, length_ramp)


def settle(
    config: configs.Config, tokenizer, mesh, say: Callable[[str], None]
) -> tuple[configs.Config, str]:
    """Decides all that text and machine decide, and returns the reason for the kernel with it.

    What follows from other fields is filled in, the attention kernel is a concrete one, and samples
    have prompts. Nothing replaces the result later: it is what the run writes down. `say` gets a
    line if questions are left out.

    Raises UsageError if no kernel fits, or if the tokenizer cannot take a prompt or a question.
    """
    config = configs.resolve(config, tokenizer.vocab)
    train = config.train
    packed = config.data.document_mask
    kernel, reason = choose_run_kernel(
        config.model, config.compute, train.seq_len, packed, mesh, train.length_ramp
    )
    prompts = choose_prompts(config.model, tokenizer, config.eval)
    check_questions(config.model, tokenizer, config.eval.questions, say)
    check_set_names(config.eval.sets, config.eval.questions)
    settled = replace(
        config,
        compute=replace(config.compute, kernel=kernel),
        eval=replace(config.eval, sample_prompts=prompts),
    )
    return settled, reason


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


# Keys that may differ between the processes of a job.
LOCAL = (
    "data.path",
    "data.sources.paths",
    "data.eval_path",
    "eval.sets.paths",
    "data.cache",
    "data.workers",
    "data.prefetch",
    "data.threads",
    "log.progress",
)


def check_batches(examples: Examples, train: configs.Train) -> None:
    """Raises UsageError, which names the field, if the text is less than a batch of any size."""
    check_sizes(examples, train.batch_size)
    for i, (_, size, _) in enumerate(train.batch_ramp):
        check_sizes(examples, size, f"batch_size of config.train.batch_ramp[{i}]")


def agree_on_job(
    config: configs.Config, mesh, data: Dataset, say: Callable[[str], None] = print
) -> tuple[configs.Config, str, Examples]:
    """The settled config, the reason for its kernel and the examples, the same on all processes.

    Raises UsageError on all processes if they were started with different configs, texts or code.
    Each would train what it was given, and what counts as replicated would silently differ. The
    keys of LOCAL may differ. The text itself is compared, and so are the counts of the mixture,
    which are made from floats. Raises UsageError also if text and settings make no rows.
    """
    wrong = None
    counts = None
    questions = None
    try:
        settled, reason = settle(config, data.tokenizer, mesh, say)
        train = settled.train
        examples = make_examples(data, settled.data, train.seq_len, settled.seed)
        check_batches(examples, train)
        if examples.mix:
            counts = [examples.mix.counts.tolist(), examples.mix.begins.tolist()]
        groups = find_questions(settled.eval.questions)
        paths = [path for group in groups for path in group.files.values()]
        questions = [digest_file(Path(path)).sha256 for path in paths]
    except UsageError as error:
        # The error is raised after the comparison below, because the other processes wait in it.
        wrong = error
        counts = str(error)

    facts = {
        f"config.{key}": value for key, value in configs.flatten(config).items() if key not in LOCAL
    }
    facts |= {
        "the text": data.content,
        "the tokenizer": data.tokenizer.fingerprint,
        "the mixture's counts": counts,
        "the questions": questions,
        "the texts of config.eval.sets": data.set_digests,
        "the code": code_identity(),
    }
    refuse_differences(find_disagreements(facts), wrong)
    if wrong:
        raise wrong
    return settled, reason, examples


def refuse_differences(different: Sequence[str], cause: UsageError | None) -> None:
    """Raises UsageError if something differs between the processes of the job."""
    # Other differences may follow from different code.
    if "the code" in different:
        raise UsageError(
            "the code (source digest and jax version): not the same on all processes of this job; "
            "install the same gpt_jax and jax on every host; this is "
            f"{describe_process_code(jax.process_index())}"
        ) from cause
    if different:
        raise UsageError(
            f"{', '.join(different)}: not the same on all processes of this job; start them with "
            "the same flags and the same text"
        ) from cause


class Steps(NamedTuple):
    """What is compiled for a run: functions of abstract or real arrays on one mesh."""

    make_state: Callable[[], TrainState]
    start: Callable[[Any], TrainState]
    abstract: TrainState  # shapes, dtypes and shardings of the state
    # (state, batch, frozen=None) -> (state, Sums), which donates the state. `frozen` is a tree of
    # parameters on the same mesh, for an objective that wants one.
    train_step: Callable
    eval_step: Callable  # (params, batch, frozen=None) -> Sums


def make_steps(config: configs.Config, mesh) -> Steps:
    """The jitted functions of a resolved config whose kernel is a concrete one.

    No array is made, so the mesh may be of devices that are not there (`gpt-jax plan`).
    """
    train = config.train
    seed = config.seed
    options = compiler_options(config, mesh) or None
    with jax.set_mesh(mesh):
        model = config.model
        network = make_network(model, config.compute)
        like = abstract_params(model)
        tx = make_run_optimizer(config, network, like)

        def start(params):
            if config.mesh.zero == 1:
                params = sharding.gather_fsdp(params)
            return init_state(params, tx, train)

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

        return Steps(
            jax.jit(make_state),
            jax.jit(start, donate_argnums=0),
            abstract,
            jax.jit(update, donate_argnums=0, compiler_options=options),
            jax.jit(measure, compiler_options=options),
        )


def make_run_optimizer(config: configs.Config, network: Network, like):
    """The optimiser of a run, laid out as its mesh and its memory want it.

    `like` is the tree of the parameters' shapes and layouts.
    """
    dtype = jnp.dtype(config.compute.dtype)
    tx = make_optimizer(config.optim, like, network.describe, dtype, config.model.balance_rate)

    if config.mesh.zero == 1:
        tx = make_zero1(tx, partial(sharding.lay_out_like, like=like), sharding.gather_fsdp)
    return keep_on_host(tx) if config.optim.state_memory == "host" else tx


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
            *describe_optimizer(config, steps.abstract.params),
            *describe_unsharded(steps.abstract, mesh, config.mesh.zero),
        )
    return Parts(config, mesh, data, examples, *steps, notes)


def describe_options(config: configs.Config, mesh) -> list[str]:
    """A line about the options that the steps are compiled with, if they have any."""
    options = compiler_options(config, mesh)
    device = mesh.devices.flat[0]
    return [describe_xla_options(device.platform, device.device_kind, options)] if options else []
