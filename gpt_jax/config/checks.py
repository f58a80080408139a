"""What must agree across the fields of a resolved config before anything compiles."""

import dataclasses

from gpt_jax.config.field_checks import faults
from gpt_jax.config.fields import Config
from gpt_jax.config.mesh_checks import mesh_faults
from gpt_jax.config.meshes import mesh_shape
from gpt_jax.errors import UsageError


def check(config: Config, devices: int = 1, tokenizer_vocab: int = 0) -> dict[str, int]:
    """Checks that the fields of a resolved config agree. Returns the sizes of the mesh's axes.

    Raises UsageError with a line for each disagreement: field, value and way out.
    """
    shape = shape_on(config, devices, tokenizer_vocab)
    lines = problems(config, shape, tokenizer_vocab)
    if lines:
        raise UsageError(*lines)
    return shape


def shape_on(config: Config, devices: int, tokenizer_vocab: int = 0) -> dict[str, int]:
    """The sizes of the mesh's axes on so many devices.

    Raises UsageError if the sizes do not multiply to that number. It names the nearest meshes on
    which this resolved config runs.
    """

    def runs(mesh):
        other = dataclasses.replace(config, mesh=mesh)
        return not problems(other, mesh_shape(mesh, devices), tokenizer_vocab)

    return mesh_shape(config.mesh, devices, runs)


def problems(config: Config, shape: dict[str, int], tokenizer_vocab: int = 0) -> list[str]:
    """All disagreements on a mesh of these axis sizes, a line each.

    A model without layers has only the faults that every mesh has, because the other checks are
    about its layers.
    """
    lines = faults(config, tokenizer_vocab)
    if config.model.pattern and config.model.windows:
        lines += mesh_faults(config, shape)
    return lines
