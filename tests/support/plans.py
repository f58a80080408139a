"""Jobs for tests of `gpt-jax plan`, traced once."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

from gpt_jax import config as configs
from gpt_jax.commands import config_file, plan as command
from gpt_jax.plan.job import make_job

CONFIGS = Path(__file__).parents[2] / "configs"
ONE = dict.fromkeys(configs.AXES, 1)


def spec_of(name: str) -> str:
    """The value of --config: "llama:8b" stands for configs/llama.py:8b."""
    name, colon, variant = name.partition(":")
    return f"{CONFIGS / name}.py{colon}{variant}"


@cache
def job_of(name: str, *overrides: str):
    return make_job(config_file.load_config(spec_of(name), list(overrides)))


def llama(*overrides: str):
    return job_of("llama:8b", *overrides)


def changed(job, **sections):
    """The job with other knobs: `compute=dict(remat="none")`."""
    changes = {
        name: replace(getattr(job.config, name), **knobs) for name, knobs in sections.items()
    }
    return job._replace(config=replace(job.config, **changes))


def run_plan(name: str, topology: str, *words: str) -> None:
    """`gpt-jax plan` of configs/NAME, in this process."""
    command.main([f"--config={spec_of(name)}", f"--topology={topology}", *words])


def read_plan(capsys) -> dict:
    """The JSON that the command printed."""
    return json.loads(capsys.readouterr().out)
