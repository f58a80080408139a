"""What all processes of a job agree on before anything compiles: config, text and code."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import jax

from gpt_jax import config as configs
from gpt_jax.cluster import code_identity, describe_process_code, find_disagreements
from gpt_jax.data import Dataset, Examples, check_sizes, make_examples
from gpt_jax.errors import UsageError
from gpt_jax.evals import check_questions, check_set_names, choose_prompts, find_questions
from gpt_jax.files import digest_file
from gpt_jax.model import choose_kernel, make_problem


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
