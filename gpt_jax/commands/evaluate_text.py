"""`gpt-jax evaluate` on text: the held-out text of a run, its sets, or texts of --text."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from gpt_jax.commands.evaluate_tasks import name_checkpoint, without_nan
from gpt_jax.errors import UsageError

RATES = ("loss", "perplexity", "bits_per_byte", "accuracy")

Rows = dict[str, dict[str, float]]  # {text: metrics}
More = dict[str, float | str]
Say = Callable[[str], None]


class Measured(NamedTuple):
    """What was measured of one checkpoint.

    With several sources, `sources` has also a row `all`, which the help of the command explains.
    """

    checkpoint: str  # its URL, or the folder of the checkpoints
    step: int
    sources: Rows
    sets: Rows  # of config.eval.sets
    more: More  # what --evaluators give

    def to_json(self) -> dict[str, Any]:
        values: dict[str, Any] = {"checkpoint": self.checkpoint, "step": self.step}
        values["sources"] = {name: without_nan(row) for name, row in self.sources.items()}
        if self.sets:
            values["sets"] = {name: without_nan(row) for name, row in self.sets.items()}
        return values | ({"evaluators": without_nan(self.more)} if self.more else {})


class Texts(NamedTuple):
    """The tokens that are measured."""

    sources: Mapping[str, Any]  # {name: Tokens}
    sets: Mapping[str, Any]  # those of config.eval.sets
    data: Any  # the Dataset of the run, or None for --text
    shares_at: Callable[[int], dict[str, float]]  # (examples) -> {source: share}; {} has no mean


def no_shares(examples: int) -> dict[str, float]:
    """What texts without a mixture have."""
    return {}


class TextMeter:
    """Measures checkpoints of one run. Texts and compiled programs are kept for the next one."""

    def __init__(self, args: argparse.Namespace, say: Say):
        self._args = args
        self._say = say
        self._texts: dict[Any, Texts] = {}
        self._programs: dict[Any, Callable] = {}

    def measure(self, loaded) -> Measured:
        """Evaluates a checkpoint. Raises UsageError if a text cannot be used."""
        from gpt_jax.evals import average_by_source
        from gpt_jax.metrics import add_sums

        texts = self._load_texts(loaded)
        what = "--text =" if self._args.text else "the held-out text of source"
        sums_of = self._sum(loaded, texts.sources, what)
        sums_of_sets = self._sum(loaded, texts.sets, "the text of config.eval.sets")
        shares = texts.shares_at(loaded.examples)

        rows = {name: as_row(sums) for name, sums in sums_of.items()}
        if len(rows) > 1:
            total = {}
            for sums in sums_of.values():
                total = add_sums(total, sums)
            mean = average_by_source(rows, shares) if shares else {}
            rates = {name: mean[f"eval/{name}"] for name in RATES if mean}
            rows["all"] = as_row(total) | rates

        sets = {name: as_row(sums) for name, sums in sums_of_sets.items()}
        more = {}
        if self._args.evaluators:
            more = ask(self._args.evaluators, loaded, texts.data, sums_of, sums_of_sets, shares)
        return Measured(name_checkpoint(self._args, loaded), loaded.step, rows, sets, more)

    def _load_texts(self, loaded) -> Texts:
        """The texts for a checkpoint. A run that has resumed may have changed where they lie."""
        config = loaded.config
        about = (config.data, config.eval.sets, loaded.tokenizer.fingerprint, loaded.content)
        key = (*about, config.train.seq_len, config.seed)
        if key not in self._texts:
            if self._args.text:
                texts = load_text(self._args.text, loaded, self._say)
            else:
                texts = load_own_text(loaded, self._say)
            self._texts[key] = texts
        return self._texts[key]

    def _program(self, config) -> Callable:
        """The compiled forward pass of a config: (params, batch) -> Sums."""
        import jax

        from gpt_jax.run import make_network
        from gpt_jax.train import eval_step

        key = config.model, config.compute, config.train
        if key not in self._programs:
            network = make_network(config.model, config.compute)

            @jax.jit
            def step(params, batch):
                return eval_step(params, {}, batch, network=network, train=config.train)

            self._programs[key] = step
        return self._programs[key]

    def _stride(self, config) -> int:
        """Tokens by which rows move on. Raises UsageError if --stride leaves tokens out."""
        stride = self._args.stride
        if stride is None:
            return config.eval.stride
        if stride > config.train.seq_len:
            raise UsageError(
                f"--stride={stride}: leaves tokens out between rows of config.train.seq_len = "
                f"{config.train.seq_len}; choose that, or less"
            )
        return stride

    def _sum(self, loaded, texts: Mapping[str, Any], what: str) -> dict:
        """The held-out Sums of each text, from forward passes over its batches."""
        import jax

        from gpt_jax import sharding
        from gpt_jax.data import make_eval_batches
        from gpt_jax.evals import sum_heldout

        config = loaded.config
        args = self._args
        parts = sharding.row_parts(loaded.mesh)
        batch_size = -(-(args.batch_size or config.eval.batch_size) // parts) * parts
        program = self._program(config)
        sums_of = {}
        with jax.set_mesh(loaded.mesh):
            for name, tokens in texts.items():
                batches = make_eval_batches(
                    tokens,
                    loaded.tokenizer,
                    config.data,
                    config.train.seq_len,
                    batch_size,
                    sharding.process_rows(loaded.mesh, batch_size),
                    args.batches,
                    f"{what} {name}",
                    self._stride(config),
                )
                sums_of[name] = sum_heldout(
                    program, loaded.params, batches, loaded.mesh, batch_size
                )
        return sums_of


def ask(
    names: list[str], loaded, data, sums_of: dict, sums_of_sets: dict, shares: dict[str, float]
) -> More:
    """What the evaluators `names` give for a checkpoint, with the held-out Sums of each text."""
    import jax

    from gpt_jax.evals import Evaluation, check_labelled, run_evaluators

    config = loaded.config
    if "questions" in names and not config.eval.questions:
        raise UsageError(
            "--evaluators=questions: the run has no config.eval.questions; name files with "
            "--questions"
        )
    check_labelled(names, data, "--evaluators")
    evaluation = Evaluation(
        model=config.model,
        compute=config.compute,
        knobs=replace(config.eval, evaluators=tuple(names)),
        seed=config.seed,
        params=loaded.params,
        data=data,
        step=loaded.step,
        sum_heldout=lambda: sums_of,
        shares=shares or dict.fromkeys(sums_of, 1.0),
        sum_sets=lambda: sums_of_sets,
    )
    with jax.set_mesh(loaded.mesh):
        numbers, texts = run_evaluators(evaluation)
    return numbers | texts


def load_text(paths: list[str], loaded, say: Say) -> Texts:
    """The texts of --text, each with its path for a name."""
    from gpt_jax.data import load_heldout

    sources = {}
    for path in paths:
        sources |= load_heldout(path, loaded.config.data, loaded.tokenizer, say)
    return Texts(sources, {}, None, no_shares)


def load_own_text(loaded, say: Say) -> Texts:
    """The held-out text of each source of the run, and its sets.

    A single source has no shares. Raises UsageError if the text cannot be read, has changed since
    the run, or holds nothing out.
    """
    from gpt_jax.data import load_dataset, load_sets, make_examples

    config = loaded.config
    try:
        data = load_dataset(config.data, say, loaded.tokenizer)
        data = load_sets(data, config.eval.sets, config.data, say)
    except UsageError as error:
        raise UsageError(
            f"the run's own text: {error}; call it from where the run was started, "
            "or give held-out text with --text"
        ) from None
    if data.content != loaded.content:
        raise UsageError(
            f"{config.data.where}: this text has changed since the run, and what it holds out now "
            "may have been trained on; give held-out text with --text"
        )
    if not data.heldout and not data.sets:
        why = "its folder was made by gpt-jax prepare without --eval_fraction"
        if not config.data.eval_fraction:
            why = "config.data.eval_fraction = 0"
        raise UsageError(f"the run held no text out ({why}); give some with --text")

    if len(data.parts) == 1:
        sources = dict(zip(["held-out"], data.heldout.values(), strict=False))
        return Texts(sources, data.sets, data, no_shares)
    if len(data.heldout) <= 1:
        return Texts(data.heldout, data.sets, data, no_shares)
    examples = make_examples(data, config.data, config.train.seq_len, config.seed)
    return Texts(data.heldout, data.sets, data, examples.shares)


def as_row(sums) -> dict[str, float]:
    """The metrics of one text, with the tokens and bytes that they are over."""
    from gpt_jax.evals import compute_heldout_metrics

    return compute_heldout_metrics(sums) | {
        "tokens": float(sums["loss"][1]),
        "bytes": float(sums["bits_per_byte"][1]),
    }
