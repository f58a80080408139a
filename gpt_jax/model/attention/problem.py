"""What an attention kernel is asked to do, and what each of the table KERNELS cannot do."""

from typing import NamedTuple

from gpt_jax.model.attention import flash


class Problem(NamedTuple):
    """What a kernel is asked to do. `make_problem` reads it off a config."""

    platform: str
    dtype: str
    head_dim: int
    seq_len: int
    softcap: bool
    dropout: bool
    ar: bool
    context: int = 1  # pieces into which a row is cut
    common: bool = False  # whether all segments of a row see some of its keys
    packed: bool = False  # whether documents of a row are kept apart


NO_COMMON = "has no keys in common to segments"


def uncut(p: Problem) -> str:
    if p.context > 1:
        return f"needs whole rows, and config.mesh.context = {p.context} cuts them"
    return ""


def blocked_cannot(p: Problem) -> str:
    return "has no ar blocks" if p.ar else uncut(p)


def ring_cannot(p: Problem) -> str:
    if p.common:
        return NO_COMMON
    return "has no attention dropout" if p.dropout else ""


def xla_cannot(p: Problem) -> str:
    if p.context > 1:
        return uncut(p)
    if p.softcap:
        return "has no soft-cap"
    return "has no attention dropout" if p.dropout else ""


def cudnn_cannot(p: Problem) -> str:
    if p.platform != "gpu":
        return f"needs a GPU, this is {p.platform}"
    if p.dtype == "float32":
        return "needs config.compute.dtype = bfloat16"
    # On GPUs before Hopper cuDNN refuses more than 128 by itself.
    if p.head_dim % 8 or p.head_dim > 256:
        return "needs a head_dim divisible by 8 and at most 256"
    return xla_cannot(p)


def flash_cannot(p: Problem) -> str:
    if p.platform != "gpu":
        return f"needs a GPU, this is {p.platform}"
    if not flash.has_triton():
        return "needs Pallas's Triton backend, and this JAX has none"
    if p.dropout or p.ar:
        return "has no attention dropout and no ar blocks"
    if p.common:
        return NO_COMMON
    if p.head_dim not in flash.HEAD_DIMS:
        return f"needs a head_dim of {', '.join(map(str, flash.HEAD_DIMS))}"
    return uncut(p)


def splash_cannot(p: Problem) -> str:
    if p.platform != "tpu":
        return f"needs a TPU, this is {p.platform}"
    if p.dropout or p.ar:
        return "has no attention dropout and no ar blocks"
    if p.common:
        return NO_COMMON
    multiple = 128 * p.context
    return f"needs seq_len divisible by {multiple}" if p.seq_len % multiple else ""
