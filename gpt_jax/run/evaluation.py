"""What a run measures of itself on the way: evaluators that the config asks for, and samples."""

from collections.abc import Callable, Mapping
from functools import partial

from gpt_jax import sharding
from gpt_jax.data import EvalBatches, Tokens, make_eval_batches
from gpt_jax.evals import Evaluation, draw_samples, run_evaluators, sum_heldout
from gpt_jax.run.notes import format_count
from gpt_jax.run.parts import Parts
from gpt_jax.run.progress import Progress
from gpt_jax.train import TrainState


def heldout_batches(parts: Parts) -> dict[str, EvalBatches]:
    """All held-out batches of each source, or the first few, as config.eval says.

    Raises UsageError if a source holds out too little text.
    """
    return make_batches(parts, parts.data.heldout, "the held-out text of source")


def set_batches(parts: Parts) -> dict[str, EvalBatches]:
    """The same of each set of config.eval.sets. Raises UsageError if one has too little text."""
    return make_batches(parts, parts.data.sets, "the text of config.eval.sets")


def make_batches(parts: Parts, texts: Mapping[str, Tokens], what: str) -> dict[str, EvalBatches]:
    """The batches of each of `texts`. In messages a text is called `what` and its name."""
    config = parts.config
    rows = sharding.process_rows(parts.mesh, config.eval.batch_size)
    return {
        name: make_eval_batches(
            tokens,
            parts.data.tokenizer,
            config.data,
            config.train.seq_len,
            config.eval.batch_size,
            rows,
            config.eval.batches,
            f"{what} {name}",
            config.eval.stride,
        )
        for name, tokens in texts.items()
    }


def averaged_params(progress: Progress, state: TrainState):
    """The averaged weights where the run keeps them, else the current ones."""
    return state.ema if progress.config.train.ema else state.params


# The evaluators that need no weights, because they use the steps of the run or its text alone.
WITHOUT_WEIGHTS = frozenset(("heldout", "xz"))


def find_weights(progress: Progress, params):
    """The weights for the evaluators. Adapters are merged only if one of them asks the model."""
    if WITHOUT_WEIGHTS.issuperset(progress.config.eval.evaluators):
        return params
    return progress.parts.merge(params, progress.parts.frozen)


def evaluate(progress: Progress, state: TrainState, step: int, stop: Callable[[], bool]) -> bool:
    """Records what `config.eval.evaluators` measure after update `step`.

    `stop` is asked at each batch, because all of the held-out text may take longer than who asks
    will wait. Returns False if it has cut the evaluation short.
    """
    progress.settle()
    parts = progress.parts
    config = progress.config
    params = averaged_params(progress, state)

    def eval_step(params, batch):
        return parts.eval_step(params, batch, parts.frozen)

    def sum_texts(texts: dict[str, EvalBatches], what: str):
        sums = {}
        for name, batches in texts.items():
            alive = watched(batches, progress.beat, stop)
            own = sum_heldout(eval_step, params, alive, parts.mesh, config.eval.batch_size)
            if own["loss"][1]:
                sums[name] = own
            else:
                progress.say(
                    f"step {step}: no target in {format_count(len(batches), 'held-out batch')} of "
                    f"{what} {name}, so it is left out; raise config.eval.batches"
                )
        return sums

    evaluation = Evaluation(
        model=config.model,
        compute=config.compute,
        knobs=config.eval,
        seed=config.seed,
        params=find_weights(progress, params),
        data=parts.data,
        step=step,
        sum_heldout=lambda: sum_texts(progress.heldout, "source"),
        shares=progress.shares(step),
        sum_sets=lambda: sum_texts(progress.sets, "set"),
        tick=partial(watch, progress.beat, stop),
    )
    try:
        with progress.clock.phase("eval"):
            numbers, texts = run_evaluators(evaluation)
    except CutShort:
        return False

    record(progress, step, numbers, texts)
    return True


def record(progress: Progress, step: int, numbers: dict, texts: dict) -> None:
    """Writes what was measured after update `step`. Raises Diverged for a loss of NaN."""
    if "eval/loss" in numbers:
        progress.check_finite("held-out loss", numbers["eval/loss"], step)
    if numbers:
        progress.evaluated = step, numbers
        progress.writers.write(step, numbers)
    for name, text in texts.items():
        progress.writers.text(step, name, text)
    progress.restart_rate(step)


class CutShort(Exception):
    """Somebody has asked to stop."""


def watch(beat: Callable[[], None], stop: Callable[[], bool]) -> None:
    """Tells the watchdog that the run is alive. Raises CutShort if somebody has asked to stop."""
    beat()
    if stop():
        raise CutShort


def watched(batches, beat: Callable[[], None], stop: Callable[[], bool]):
    """Passes `batches` on, and calls `watch` at each of them."""
    for batch in batches:
        watch(beat, stop)
        yield batch


def write_samples(progress: Progress, state: TrainState, step: int, count: int) -> None:
    """Draws `count` samples and writes them."""
    progress.settle()
    with progress.clock.phase("sample"):
        texts = draw_samples(
            progress.config.model,
            progress.config.compute,
            progress.parts.merge(averaged_params(progress, state), progress.parts.frozen),
            progress.parts.data.tokenizer,
            progress.config.eval,
            (progress.config.seed + step) % 2**32,
            count,
        )
    for i, text in enumerate(texts):
        progress.writers.text(step, f"sample/{i}", text)
    progress.restart_rate(step)
