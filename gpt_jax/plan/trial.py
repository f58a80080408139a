"""Configs tried on a machine: by the arithmetic, and where it is asked for by the compiler."""

from collections.abc import Callable
from typing import NamedTuple

from gpt_jax import config as configs
from gpt_jax.plan.estimate import Estimate, estimate_job
from gpt_jax.plan.job import PlanJob
from gpt_jax.plan.schedule import Schedule, estimate_schedule
from gpt_jax.plan.search import CLOSE, Candidate
from gpt_jax.plan.topology import Topology

# Programs that do not fit and are compiled all the same, before a search gives up.
MISSES = 3

# Compiles the train step of a config. It returns a Compiled as a dictionary; one that never came to
# an end has `seconds`, `peak` and `refusal` alone.
Compile = Callable[[configs.Config], dict]


class Trial(NamedTuple):
    """One config, by the arithmetic and perhaps by the compiler."""

    config: configs.Config
    estimate: Estimate
    compiled: dict | None  # What `Compile` returned; None if it was not asked.
    schedule: Schedule | None  # The step by the program; None if there is no program.
    step: float  # Seconds, by the program if there is one.
    fits: bool  # By the compiler if it was asked.

    @property
    def refusal(self) -> str:
        """What the compiler said if it did not compile the config."""
        return self.compiled["refusal"] if self.compiled else ""

    @property
    def is_fault(self) -> bool:
        """Whether the compiler refused for another reason than memory.

        Other meshes may share a fault of the compiler's own.
        """
        return bool(self.refusal) and "RESOURCE_EXHAUSTED" not in self.refusal

    @property
    def peak(self) -> float:
        """Bytes by the compiler, or by the arithmetic if the compiler named none."""
        compiled_peak = self.compiled["peak"] if self.compiled else 0
        return compiled_peak or self.estimate.memory.peak


def try_config(
    job: PlanJob, topology: Topology, config: configs.Config, compile_config: Compile | None
) -> Trial:
    """Tries one config. It is compiled only if it can run.

    Raises UsageError if the config has no mesh of so many devices.
    """
    job = job._replace(config=config)
    estimate = estimate_job(job, topology)
    if not compile_config or estimate.problems:
        return Trial(config, estimate, None, None, estimate.step, estimate.fits)

    compiled = compile_config(config)
    if compiled["refusal"]:
        return Trial(config, estimate, compiled, None, estimate.step, fits=False)
    schedule = estimate_schedule(job, topology, estimate.kernel, compiled["program"])
    fits = compiled["peak"] <= topology.chip.memory
    return Trial(config, estimate, compiled, schedule, schedule.step, fits)


def try_candidates(
    job: PlanJob,
    topology: Topology,
    candidates: list[Candidate],
    compile_config: Compile | None,
    wanted: int,
) -> list[Trial]:
    """Tries candidates from the first one, until `wanted` fit.

    One that the compiler refuses rules out all that need as much by the arithmetic. The search ends
    at a fault of the compiler, and after MISSES programs more than are wanted.
    """
    trials: list[Trial] = []
    limit = float("inf")
    for candidate in candidates:
        peak = candidate.estimate.memory.peak
        if peak >= limit:
            continue
        trial = try_config(job, topology, candidate.config, compile_config)
        trials.append(trial)
        if not trial.fits:
            limit = CLOSE * peak

        enough = sum(trial.fits for trial in trials) >= max(1, wanted)
        if enough or trial.is_fault or len(trials) >= MISSES + wanted:
            break
    return trials
