"""What `import gpt_jax` offers: a run and a trained model in a few lines of Python."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt_jax import config as configs
from gpt_jax.data import is_remote
from gpt_jax.errors import UsageError
from gpt_jax.run.fetch import MIRROR
from gpt_jax.run.loaded import Loaded, tell
from gpt_jax.run.parts import Parts, build as build_parts
from gpt_jax.run.restore import load_model


def build(
    config: configs.Config | Mapping[str, Any],
    say: Callable[[str], None] = tell,
    workdir: str | Path | None = None,
) -> Parts:
    """The parts of a run: mesh, data, and the compiled steps.

    `config` is a Config, or nested mappings that hold what differs from the defaults; the
    ConfigDict of a file in configs/ is one. A run that may resume gives its `workdir`, if that is
    a folder. Raises UsageError if it cannot be run.
    """
    if is_remote(workdir or ""):
        raise UsageError(
            f"workdir = {str(workdir)!r}: is a URL, which is not read here; leave it out"
        )
    is_made = isinstance(config, configs.Config)
    return build_parts(
        config if is_made else configs.from_dict(config), say, Path(workdir) if workdir else None
    )


def load(
    path: str,
    step: int = 0,
    devices: int = 0,
    say: Callable[[str], None] = tell,
    mirror: str = MIRROR,
    base: str = "",
) -> Loaded:
    """The model of a workdir or a folder of checkpoints, for evaluation and generation.

    `path` may be a URL, of which a copy is made below the folder `mirror`. `base` is where the
    weights beneath adapters are now, if they have moved.

    `step` 0 is the newest valid checkpoint, and `devices` 0 means all. The arrays `params` lie on
    `mesh`, so use them inside `jax.set_mesh(loaded.mesh)`. Raises UsageError if there is no such
    checkpoint, and NoCheckpoint if it is damaged.
    """
    return load_model(path, step, say, devices, is_decoding=True, mirror=mirror, base=base)


def generate(
    loaded: Loaded,
    prompts: str | Sequence[str],
    say: Callable[[str], None] = tell,
    **sampling: Any,
) -> list[str]:
    """Continuations of `prompts`, see `Loaded.generate`."""
    return loaded.generate(prompts, say, **sampling)
