"""The table of what a card says of a row, and the card itself."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from gpt_jax import config as configs
from gpt_jax.card.finding import FAIL, NOT_CHECKED, PASS, CannotCheckError, Finding, Result
from gpt_jax.card.fits import check_machines
from gpt_jax.card.foreign import check_reference, check_round_trip
from gpt_jax.card.inference import check_decoding, check_harness, check_scores
from gpt_jax.card.meshes import check_meshes
from gpt_jax.card.subject import Subject
from gpt_jax.card.training import check_reshard, check_resume, check_training
from gpt_jax.errors import Exit, Stopped, plain


class Check(NamedTuple):
    """A question to a subject. `how` is a sentence for the page."""

    run: Callable[[Subject], Result]
    how: str


# The order counts, because the first check makes the weights that the others look at.
CHECKS = {
    "trains": Check(check_training, "The loss of the last step is below that of the first."),
    "resumes": Check(
        check_resume,
        "A second run goes on from the checkpoint at half the steps. Its losses and its state are "
        "compared with those of the first.",
    ),
    "reshards": Check(
        check_reshard, "The last checkpoint is read onto each mesh, and compared to the bit."
    ),
    "meshes": Check(
        check_meshes,
        "Loss and gradients of one batch on each mesh are compared with one device. The figure is "
        "a part of a gradient's largest entry, and the limit is 1e-4.",
    ),
    "decodes": Check(
        check_decoding,
        "Logits out of the KV cache are compared with a pass over the whole text. The "
        "limit is 1e-4 of the largest logit.",
    ),
    "scores": Check(
        check_scores,
        "Scores of continuations in shared rows are compared with sums of log-probabilities, a "
        "text at a time.",
    ),
    "harness": Check(
        check_harness,
        "lm-evaluation-harness asks a local task, and each answer is compared with the plain sum.",
    ),
    "exports": Check(
        check_round_trip, "The weights are written for Hugging Face, and read again from there."
    ),
    "reference": Check(
        check_reference,
        "transformers opens the written directory. Its logits and gradients are compared with "
        "ours, in parts of the largest entry. The limit is 1e-4.",
    ),
    "fits": Check(
        check_machines,
        "The arithmetic of `gpt-jax plan --search` is asked about the row's own shape.",
    ),
}


class Card(NamedTuple):
    """All that was found about a row, and the two shapes."""

    name: str
    date: str
    row: configs.Config
    checked: configs.Config
    has_weights: bool
    findings: list[Finding]


def make_card(subject: Subject, date: str, names: Sequence[str] = tuple(CHECKS)) -> Card:
    """Makes the checks `names` in the order of the table."""
    findings = []
    for name, check in CHECKS.items():
        if name not in names:
            continue
        finding = make_finding(name, check, subject)
        subject.say(f"{subject.name}: {name}: {finding.verdict}: {finding.figure}")
        findings.append(finding)
    return Card(subject.name, date, subject.row, subject.config, subject.has_weights, findings)


def make_finding(name: str, check: Check, subject: Subject) -> Finding:
    """Makes one check. An error inside is a FAIL that names it, and not the end of the card."""
    try:
        result = check.run(subject)
    except CannotCheckError as reason:
        return Finding(name, NOT_CHECKED, str(reason), check.how)
    except Stopped:
        raise
    except Exit as error:
        return Finding(name, FAIL, plain(error), check.how)
    except Exception as error:
        return Finding(name, FAIL, f"{type(error).__name__}: {plain(error)}", check.how)
    return Finding(name, PASS if result.holds else FAIL, result.figure, check.how)
