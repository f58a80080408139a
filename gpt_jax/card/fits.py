"""The check of the row's own shape: which machines its state and its activations fit on.

It is arithmetic, by the search of `gpt-jax plan`. Nothing is compiled.
"""

from gpt_jax import plan
from gpt_jax.card.finding import CannotCheckError, Result
from gpt_jax.card.subject import Subject
from gpt_jax.errors import UsageError

MACHINES = ("h100:1", "h100:8", "h100:64", "h200:8", "v5e:4x4", "v6e:16x16", "v5p:4x4x4")


def check_machines(subject: Subject) -> Result:
    """The row fits on at least one of MACHINES, with the best mesh there."""
    try:
        plan.resolve_vocab(subject.row)
    except UsageError as error:
        raise CannotCheckError(str(error)) from None

    lines = {machine: describe_machine(subject, machine) for machine in MACHINES}
    fitting = [f"{machine} ({line})" for machine, line in lines.items() if line]
    missing = [machine for machine, line in lines.items() if not line]
    figure = "; ".join(fitting)
    if missing:
        figure = f"{figure}; not on {', '.join(missing)}".removeprefix("; ")
    return Result(bool(fitting), figure)


def describe_machine(subject: Subject, machine: str) -> str:
    """The peak memory of the best mesh on a machine, or "" if none fits."""
    topology = plan.parse_topology(machine, 1)
    line = plan.CommandLine(subject.name, [], subject.row)
    try:
        found = plan.make_plan(plan.Request(subject.row, topology, [], line, search=1))
    except UsageError:
        # The search has found nothing, and says so in this way.
        return ""
    if not found.best.fits:
        return ""
    gib = 2**30
    return f"{found.best.peak / gib:.3g} of {topology.chip.memory / gib:.3g} GiB"
