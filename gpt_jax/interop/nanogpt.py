"""The `ckpt.pt` of nanoGPT: weights and settings of a model, and nothing else of the file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt_jax.errors import UsageError
from gpt_jax.interop.torch_file import TorchTensor, read_torch_file

# What torch.compile and DistributedDataParallel put before names.
PREFIXES = ("_orig_mod.", "module.")
LEFT_OUT = (".attn.bias", ".attn.masked_bias")


def open_nanogpt(path: Path) -> tuple[dict[str, Any], dict[str, TorchTensor]]:
    """The settings of the family nanogpt, and the tensors of the model by name.

    Raises UsageError for a file that is no checkpoint of nanoGPT, or would run code.
    """
    saved = read_torch_file(path)
    state = saved.get("model")
    settings = saved.get("model_args")
    if not isinstance(state, Mapping) or not isinstance(settings, Mapping):
        raise UsageError(f"{path}: is no checkpoint of nanoGPT: it needs model and model_args")

    tensors = {}
    for name, tensor in state.items():
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
        if isinstance(tensor, TorchTensor) and not name.endswith(LEFT_OUT):
            tensors[name] = tensor
    return {"model_type": "nanogpt", **settings}, tensors
