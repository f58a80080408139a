"""Checks of the way to other projects and back, and against their own implementation.

The figures are parts of the largest entry: of the logits, and of each parameter's gradient.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax import config as configs, interop, run, sharding
from gpt_jax.card.finding import CannotCheckError, Result
from gpt_jax.card.inference import prepare
from gpt_jax.card.meshes import compare_gradients
from gpt_jax.card.reference import compute_reference
from gpt_jax.card.subject import Subject, find_step, take_ids
from gpt_jax.errors import UsageError
from gpt_jax.model import Transformer

ROWS = 2
# As in the project's tests of families, for gradients with a sum over all tokens.
TOLERANCE = 1e-4


def export(subject: Subject) -> tuple[Any, Path]:
    """(the trained model, the directory of Hugging Face that it is written to, once).

    Raises CannotCheckError if no family of models holds it.
    """
    step = find_step(subject)
    origin = run.open_model(str(subject.workdir), step, subject.say)
    directory = subject.folder / "hf"
    if not directory.exists():
        try:
            interop.write_config(origin.model)
        except UsageError as error:
            raise CannotCheckError(explain_no_family(error)) from None
        interop.write_directory(origin, directory)
    return origin, directory


def explain_no_family(error: UsageError) -> str:
    """One line of the refusal: the nearest family, and the fields that it cannot say."""
    first, *rest = error.args
    nearest = first.partition("nearest is ")[2].partition(",")[0]
    section = "config.model."
    lines = [line.strip() for line in rest]
    fields = [
        line.partition(" = ")[0].removeprefix(section) for line in lines if line.startswith(section)
    ]
    return f"no foreign family holds it; the nearest is {nearest}, which lacks {', '.join(fields)}"


def read_params(origin: Any) -> dict[str, np.ndarray]:
    """Every parameter of an opened model by path."""
    whole = {path: tuple(map(slice, shape)) for path, shape in origin.shapes.items()}
    return {path: origin.read(path, index) for path, index in whole.items()}


def check_round_trip(subject: Subject) -> Result:
    """What is exported and imported again is the model to the bit, and computes the same."""
    origin, directory = export(subject)
    again = interop.open_foreign(directory, tokenizer="bytes")
    ours = read_params(origin)
    theirs = read_params(again)
    same = [path for path in ours if ours[path].tobytes() == theirs[path].tobytes()]

    ids = take_ids(subject, ROWS)
    before = compute_ours(subject, origin.model, ours, ids)
    after = compute_ours(subject, again.model, theirs, ids)
    logits, gradients = compare(before, after)
    return Result(
        len(same) == len(ours) and logits == 0 and gradients == 0,
        f"family {again.family}: {len(same)} of {len(ours)} parameters equal to the bit; logits "
        f"differ by {logits:.1e}, gradients by {gradients:.1e}",
    )


def check_reference(subject: Subject) -> Result:
    """Logits and gradients are those of transformers on the exported directory."""
    origin, directory = export(subject)
    ids = take_ids(subject, ROWS)
    theirs = compute_reference(directory, ids, subject.folder / "gradients")
    ours = compute_ours(subject, origin.model, read_params(origin), ids)
    gradients = read_params(interop.open_foreign(theirs.gradients, tokenizer="bytes"))
    logits_error, gradient_error = compare(ours, (theirs.logits, gradients))
    return Result(
        logits_error <= TOLERANCE and gradient_error <= TOLERANCE,
        f"{theirs.kind} of transformers {theirs.version}: logits differ by {logits_error:.1e}, "
        f"gradients by {gradient_error:.1e}",
    )


def compute_ours(
    subject: Subject, model: configs.Model, params: dict[str, np.ndarray], ids: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(logits [B, T, V], the gradient of the mean cross-entropy by path), without dropout."""
    _, compute = prepare(subject)
    network = Transformer(configs.for_inference(model, compute)[0], compute)

    def measure(params):
        logits: Any = network.apply({"params": params}, {"tokens": ids})
        logprobs = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(logprobs, ids[:, 1:, None], -1).mean(), logits

    grads, logits = jax.jit(jax.grad(measure, has_aux=True))(nest(params))
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    return np.asarray(logits), {sharding.join_path(path): np.asarray(leaf) for path, leaf in leaves}


def nest(params: dict[str, np.ndarray]) -> dict[str, Any]:
    """Parameters by path -> the tree of nested dicts."""
    tree: dict[str, Any] = {}
    for path, value in params.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


def compare(ours, theirs) -> tuple[float, float]:
    """The largest differences of (logits, gradients), as parts of the largest entry."""
    logits, grads = ours
    other_logits, other_grads = theirs
    logits_error = float(np.abs(other_logits - logits).max() / np.abs(logits).max())
    return logits_error, compare_gradients(grads, other_grads)
