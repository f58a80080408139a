"""Results as one page that stands alone: rates, a comparison, and questions with their answers."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from gpt_jax.evals.compared import Compared
from gpt_jax.evals.core_mean import CoreMean
from gpt_jax.evals.paired import Difference
from gpt_jax.evals.results import Answer, Shown, TaskResult, summarize_task
from gpt_jax.metrics import format_card, format_table, make_page


class Comparison(NamedTuple):
    """How results differ from older ones. `name` names those.

    `apart` are tasks that cannot be compared. `core` is the difference of the means of CORE's
    tasks, where they were asked.
    """

    name: str
    tasks: Sequence[Compared]
    apart: Sequence[str]
    core: Difference | None = None


class Page(NamedTuple):
    """What a page shows."""

    title: str
    subtitle: str
    tasks: Sequence[TaskResult]
    core: CoreMean | None = None
    comparison: Comparison | None = None


def make_results_page(page: Page) -> str:
    """The HTML of a page. All texts are escaped, and nothing is loaded from elsewhere."""
    body = [_format_rates(page.tasks)]
    if page.core:
        value = f"{page.core.value:.4f} ± {page.core.stderr:.4f}"
        body.insert(0, _in_card(format_table((), [(page.core.label, value)])))
    if page.comparison:
        body.append(_format_comparison(page.comparison))
    body += [_format_examples(task) for task in page.tasks]
    return make_page(page.title, page.subtitle, "".join(body))


def _in_card(html: str) -> str:
    return f'<div class="card">{html}</div>'


def format_p(p: float) -> str:
    """A p-value for people."""
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def format_difference(difference: Difference) -> list[str]:
    """The cells of a difference: its value, the interval of 95 %, and the p-value."""
    value, low, high, p = difference
    return [f"{value:+.4f}", f"{low:+.4f} to {high:+.4f}", format_p(p)]


def _format_rates(tasks: Iterable[TaskResult]) -> str:
    lines = []
    for task in tasks:
        summary = summarize_task(task)
        counts = [str(summary[name]) for name in ("questions", "cut", "left_out", "not_finite")]
        for metric in task.metrics:
            rate = f"{summary[metric]:.4f} ± {summary[f'{metric}_stderr']:.4f}"
            guess = "" if task.baseline is None else f"{task.baseline:.3f}"
            centred = summary.get(f"{metric}_centred")
            own = "" if centred is None else f"{centred:.4f}"
            shots = "" if task.shots is None else str(task.shots)
            lines.append([task.name, shots, metric, rate, guess, own, *counts])
    header = ["task", "shots", "metric", "rate ± standard error", "guessing", "centred"]
    header += ["questions", "cut", "left out", "not finite"]
    return f"<h2>Rates</h2>{_in_card(format_table(header, lines))}"


def _format_comparison(comparison: Comparison) -> str:
    lines = []
    for one in comparison.tasks:
        rates = [f"{one.old:.4f}", f"{one.new:.4f}"]
        counts = [one.paired.questions, one.paired.gained, one.paired.lost, one.apart]
        cells = format_difference(one.paired.difference)
        lines.append([one.task, one.metric, *rates, *cells, *map(str, counts)])
    header = ["task", "metric", "before", "now", "difference", "95 %", "p"]
    header += ["questions", "gained", "lost", "not shared"]
    html = format_table(header, lines)
    if comparison.core:
        cells = ["mean of the shared tasks", *format_difference(comparison.core)]
        html = format_table(["", "difference", "95 %", "p"], [cells]) + html
    if comparison.apart:
        html += format_table((), [("not compared", ", ".join(comparison.apart))])
    # The heading goes through a card, which escapes it.
    return format_card(f"Compared with {comparison.name}", html, is_open=True)


def _format_examples(task: TaskResult) -> str:
    shown = [(answer, answer.shown) for answer in task.answers if answer.shown]
    if not shown:
        return ""
    parts = [_format_example(answer, words, task.metrics) for answer, words in shown]
    return format_card(f"{task.name}: the first {len(parts)} questions", "".join(parts))


def _format_example(answer: Answer, shown: Shown, metrics: Sequence[str]) -> str:
    right = zip(metrics, answer.right, strict=True)
    verdict = ", ".join(
        f"{metric}: {'right' if is_right else 'wrong'}" for metric, is_right in right
    )
    lines = []
    for number, option in enumerate(shown.options):
        marks = []
        if number == shown.gold:
            marks.append("right")
        if number == shown.chosen:
            marks.append("chosen")
        value, share = shown.values[number], shown.shares[number]
        cells = [f"{share:.4f}", f"{value:.3f}"] if math.isfinite(value) else ["-", "-"]
        lines.append([", ".join(marks), option, *cells])
    head = format_table((), [(f"row {answer.row}", shown.context), ("judged", verdict)])
    return head + format_table(["", "option", "probability", "compared, in nats"], lines)
