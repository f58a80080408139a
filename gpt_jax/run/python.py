"""What `import gpt_jax` offers: a run and a trained model in a few lines of Python."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax

from gpt_jax import config as configs
from gpt_jax.errors import UsageError
from gpt_jax.infer import Sampling, generate as generate_completions
from gpt_jax.run.parts import Parts, build as build_parts
from gpt_jax.run.restore import Loaded, load_model


def tell(line: str) -> None:
    """Prints a message on standard error."""
    print(line, file=sys.stderr)


def build(
    config: configs.Config | Mapping[str, Any],
    say: Callable[[str], None] = tell,
    workdir: Path | None = None,
) -> Parts:
    """The parts of a run: mesh, data, and the compiled steps.

    `config` is a Config, or nested mappings that hold what differs from the defaults; the
    ConfigDict of a file in configs/ is one. A run that may resume gives its `workdir`. Raises
    UsageError if it cannot be run.
    """
    is_made = isinstance(config, configs.Config)
    return build_parts(config if is_made else configs.from_dict(config), say, workdir)


def load(path: str, step: int = 0, devices: int = 0, say: Callable[[str], None] = tell) -> Loaded:
    """The model of a workdir or a folder of checkpoints, for evaluation and generation.

    `step` 0 is the newest valid checkpoint, and `devices` 0 means all. The arrays `params` lie on
    `mesh`, so use them inside `jax.set_mesh(loaded.mesh)`. Raises UsageError if there is no such
    checkpoint, and NoCheckpoint if it is damaged.
    """
    return load_model(path, step, say, devices, is_decoding=True)


def generate(
    loaded: Loaded,
    prompts: str | Sequence[str],
    say: Callable[[str], None] = tell,
    **sampling: Any,
) -> list[str]:
    """Continuations of `prompts`, `num_samples` for each, in the order of the prompts.

    A text alone is one prompt. `sampling` are the fields of infer.Sampling, such as temperature,
    top_p and seed. Raises UsageError if one of them is unknown, of another type or out of range, or
    if a prompt does not fit.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise UsageError(f"prompts: {prompt!r} is no text; give a text or a list of texts")
    settings = cast(Sampling, configs.from_dict(sampling, Sampling, "sampling"))
    with jax.set_mesh(loaded.mesh):
        completions = generate_completions(
            loaded.config.model,
            loaded.config.compute,
            loaded.params,
            loaded.tokenizer,
            list(prompts),
            settings,
            say,
        )
    return [completion.text for completion in completions]
