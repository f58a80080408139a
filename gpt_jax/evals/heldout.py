"""What is measured on held-out text, and samples (floor 3; called by loop and the evaluate
command)."""

import lzma
from collections.abc import Callable, Iterable, Mapping

import jax

from gpt_jax import sharding
from gpt_jax.data import Dataset
from gpt_jax.metrics import Sums, add_sums, divide_sums, perplexity


def sum_heldout(step: Callable, params, batches: Iterable, mesh, batch_size: int) -> Sums:
    """Sums of `step(params, batch)` over all `batches` (this process's rows of each); fetched
    once, at the end."""
    total: Sums = {}
    for columns in batches:
        total = add_sums(total, step(params, sharding.to_devices(mesh, columns, batch_size)))
    return jax.device_get(total)


def compute_heldout_metrics(sums: Sums) -> dict[str, float]:
    """loss (nats a token), perplexity, bits_per_byte and accuracy."""
    means = divide_sums(sums)
    return {
        "loss": means["loss"],
        "perplexity": perplexity(*sums["loss"]),
        "bits_per_byte": means["bits_per_byte"],
        "accuracy": means["accuracy"],
    }


def average_by_source(
    found: Mapping[str, Mapping[str, float]], shares: Mapping[str, float]
) -> dict[str, float]:
    """`eval/<metric>` of {source: metrics}: of the only source, or the mean weighted by the
    sources' `shares` of the rows trained on (perplexity: of the mean loss), and then
    `eval/<source>/<metric>` besides."""
    total = sum(shares[name] for name in found)
    weight = {name: shares[name] / total if total else 1 / len(found) for name in found}
    mean = {
        metric: sum(weight[name] * found[name][metric] for name in found)
        for metric in next(iter(found.values()))
    }
    mean["perplexity"] = perplexity(mean["loss"], 1)
    own = {
        f"eval/{name}/{metric}": value
        for name, row in found.items()
        for metric, value in row.items()
    }
    return {f"eval/{metric}": value for metric, value in mean.items()} | (
        own if len(found) > 1 else {}
    )


def heldout_text(data: Dataset) -> bytes:
    """The held-out text of all sources, as the tokenizer gives it back."""
    return b"".join(
        data.tokenizer.decode_bytes(tokens.ids(0, tokens.size)) for tokens in data.heldout.values()
    )


def measure_xz_bits_per_byte(data: Dataset) -> float:
    """What `xz -9` needs for the held-out text: a yardstick that anyone can check, in the
    model's own unit."""
    text = heldout_text(data)
    return 8 * len(lzma.compress(text, preset=9)) / len(text)
