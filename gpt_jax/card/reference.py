"""What transformers computes with a directory, where the extra `reference` is installed."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt_jax.card.finding import CannotCheckError


class Reference(NamedTuple):
    """The logits [B, T, V], and a directory whose tensors are the gradients of the weights."""

    kind: str
    version: str
    logits: np.ndarray
    gradients: Path


def compute_reference(directory: Path, ids: np.ndarray, target: Path) -> Reference:
    """Logits of `ids` [B, T], and gradients of the mean cross-entropy, written to `target`.

    Raises CannotCheckError without the packages torch and transformers.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports] an extra
        import transformers  # pyright: ignore[reportMissingImports] an extra
    except ModuleNotFoundError as error:
        raise CannotCheckError(
            f"{error.name} is not installed: pip install 'gpt_jax[reference]'"
        ) from None

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32
    ).eval()
    logits = model(input_ids=torch.tensor(ids, dtype=torch.long), use_cache=False).logits
    targets = torch.tensor(ids[:, 1:], dtype=torch.long)
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten()).backward()

    # A model that is saved gives its tensors the names of the directory, whatever its own are.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            )
    model.save_pretrained(target)
    return Reference(
        type(model).__name__, transformers.__version__, logits.detach().numpy(), target
    )
