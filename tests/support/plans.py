"""Jobs for tests of `gpt-jax plan`, traced once."""

from dataclasses import replace
from functools import cache
from pathlib import Path

from gpt_jax import config as configs
from gpt_jax.commands import config_file
from gpt_jax.plan.job import make_job

CONFIGS = Path(__file__).parents[2] / "configs"
ONE = dict.fromkeys(configs.AXES, 1)


@cache
def job_of(spec: str, *overrides: str):
    name, _, variant = spec.partition(":")
    return make_job(
        config_file.load_config(
            f"{CONFIGS / name}.py" + f":{variant}" * bool(variant), list(overrides)
        )
    )


def llama(*overrides: str):
    return job_of("llama:8b", *overrides)


def changed(job, **sections):
    """The job with other knobs: `model=dict(remat="none")`."""
    made = {name: replace(getattr(job.config, name), **knobs) for name, knobs in sections.items()}
    return job._replace(config=replace(job.config, **made))
