"""A plan: one config on one machine, or the best of a search, with all that is said about it."""

from collections.abc import Callable
from typing import NamedTuple

from gpt_jax import config as configs
from gpt_jax.errors import UsageError
from gpt_jax.plan.advice import Advice, explain_nothing_fits, give_advice
from gpt_jax.plan.command_line import CommandLine, choose_overrides, format_command
from gpt_jax.plan.horizon import Horizon, estimate_horizon
from gpt_jax.plan.job import PlanJob, make_job
from gpt_jax.plan.ramp import describe_ramp, pick_largest, put_ramp_back, refuse_search
from gpt_jax.plan.search import Candidate, list_overrides, search_meshes
from gpt_jax.plan.topology import Topology
from gpt_jax.plan.trial import Trial, try_candidates, try_config
from gpt_jax.plan.wording import format_verdict


class Request(NamedTuple):
    """What is asked about a config."""

    config: configs.Config
    topology: Topology
    notes: list[str]  # Lines that come before the plan.
    line: CommandLine  # Where the config comes from.
    search: int = 0  # How many of the best meshes are shown; 0 plans the config's own.
    programs: int = 0  # How many programs that fit are compiled.
    data_tokens: float = 0  # 0 if nobody knows.
    write_bandwidth: float = 1e9  # Bytes a second that one host writes to storage.


class Plan(NamedTuple):
    """All that is said about a config on a machine."""

    topology: Topology
    base: configs.Config  # The config that was asked about, resolved.
    job: PlanJob  # The job with the best trial's config.
    notes: list[str]
    ranking: list[Candidate]  # The best of a search that are shown; empty without one.
    count: int  # Meshes, policies and microbatches that fit by the arithmetic; 0 without a search.
    trials: list[Trial]
    best: Trial
    horizon: Horizon
    command: str  # What trains the best of a search; "" without one, and if it does not fit.
    replaced: list[str]  # Overrides of the command line that this command could not keep.
    verdict: str
    problems: list[str]  # Why it cannot run or does not fit.
    advice: Advice | None  # None if nobody needs it.

    @property
    def trouble(self) -> str:
        """What is wrong, in a line; "" if the config fits and runs."""
        return f"{self.topology}: {self.problems[0]}" if self.problems else ""


def make_plan(request: Request, compile_step: Callable[[list[str]], dict] | None = None) -> Plan:
    """Plans the config of a request, or the best of a search.

    `compile_step` gets the overrides that lead from the request's config to another one, and
    returns what the compiler made of it (see trial.Compile).

    Raises UsageError if the config cannot be planned at all, and if a search finds nothing.
    """
    topology = request.topology
    if request.search:
        refuse_search(request.config.train)
    asked = make_job(request.config)
    job = pick_largest(asked, topology)
    candidates = _search(request, job)
    trials = _try(request, job, candidates, compile_step)
    best = min(trials, key=lambda trial: (not trial.fits, trial.step))

    verdict = best.refusal or format_verdict(best.peak, topology)
    problems = [*best.estimate.problems]
    if not best.fits:
        problems.append(verdict)
    advice = None
    if problems and not best.is_fault:
        advice = give_advice(job, topology, _list_refused(trials))
        advice = put_ramp_back(advice, asked, topology)

    command = ""
    replaced: list[str] = []
    if request.search and best.fits:
        overrides, replaced = choose_overrides(request.line, best.config)
        command = format_command(request.line.spec, overrides)
    return Plan(
        topology=topology,
        base=asked.config,
        job=job._replace(config=best.config),
        notes=[*request.notes, *describe_ramp(request.config.train, job.config.train)],
        ranking=candidates[: request.search],
        count=len(candidates),
        trials=trials,
        best=best,
        horizon=_look_ahead(request, job, best),
        command=command,
        replaced=replaced,
        verdict=problems[0] if problems else verdict,
        problems=problems,
        advice=advice,
    )


def _search(request: Request, job: PlanJob) -> list[Candidate]:
    """Returns all that fits, best first, or nothing if no search is asked for."""
    if not request.search:
        return []
    candidates = search_meshes(job, request.topology)
    if not candidates:
        raise UsageError(f"--search: {explain_nothing_fits(job, request.topology)}")
    return candidates


def _try(
    request: Request,
    job: PlanJob,
    candidates: list[Candidate],
    compile_step: Callable[[list[str]], dict] | None,
) -> list[Trial]:
    """Tries the candidates of a search, or else the config itself."""

    def compile_config(config: configs.Config) -> dict:
        assert compile_step
        return compile_step(list_overrides(request.config, config))

    asked = compile_config if compile_step else None
    if candidates:
        return try_candidates(job, request.topology, candidates, asked, request.programs)
    return [try_config(job, request.topology, job.config, asked)]


def _look_ahead(request: Request, job: PlanJob, best: Trial) -> Horizon:
    train = request.config.train
    return estimate_horizon(
        job._replace(config=best.config),
        request.topology,
        best.step,
        configs.make_batch_sizes(train).examples(train.steps) * train.seq_len,
        by="compiler" if best.schedule else "arithmetic",
        data_tokens=request.data_tokens,
        write_bandwidth=request.write_bandwidth,
    )


def _list_refused(trials: list[Trial]) -> list[tuple[float, float]]:
    """Returns peaks of what the compiler refused, (by the arithmetic, by the compiler)."""
    return [
        (trial.estimate.memory.peak, trial.compiled["peak"])
        for trial in trials
        if trial.compiled and not trial.fits
    ]
