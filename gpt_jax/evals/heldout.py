"""What is measured on held-out text."""

import lzma
from collections.abc import Callable, Iterable, Mapping

import jax

from gpt_jax import sharding
from gpt_jax.data import Dataset
from gpt_jax.metrics import Sums, add_sums, divide_sums, own_metrics, perplexity


def sum_heldout(step: Callable, params, batches: Iterable, mesh, batch_size: int) -> Sums:
    """Sums `step(params, batch)` over all `batches`, which are this process's rows of each.

    The sums are fetched once, at the end.
    """
    total: Sums = {}
    for columns in batches:
        batch = sharding.to_devices(mesh, columns, batch_size)
        total = add_sums(total, step(params, batch))
    return jax.device_get(total)


def compute_heldout_metrics(sums: Sums) -> dict[str, float]:
    """Computes loss (nats a token), perplexity, bits_per_byte and accuracy.

    What else the objective sums follows under its own name.
    """
    means = divide_sums(sums)
    return {
        "loss": means["loss"],
        "perplexity": perplexity(*sums["loss"]),
        "bits_per_byte": means["bits_per_byte"],
        "accuracy": means["accuracy"],
        **own_metrics(means),
    }


def average_by_source(
    metrics: Mapping[str, Mapping[str, float]], shares: Mapping[str, float]
) -> dict[str, float]:
    """Names the metrics of {source: metrics} for the log, and averages them over sources.

    `eval/<metric>` is the mean, weighted by the sources' `shares` of the rows trained on. The
    perplexity is that of the mean loss. `eval/<source>/<metric>` follows for a mixture of sources.
    Sources without held-out text have no part in the mean.
    """
    total = sum(shares[name] for name in metrics)
    weights = {name: shares[name] / total if total else 1 / len(metrics) for name in metrics}

    names = next(iter(metrics.values()))
    mean = {
        name: sum(weights[source] * metrics[source][name] for source in metrics) for name in names
    }
    mean["perplexity"] = perplexity(mean["loss"], 1)

    averaged = {f"eval/{name}": value for name, value in mean.items()}
    if len(shares) == 1:
        return averaged
    return averaged | name_by_text(metrics)


def name_by_text(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """{text: {metric: value}} as `eval/<text>/<metric>`, for sources and sets alike."""
    return {
        f"eval/{text}/{name}": value for text, row in metrics.items() for name, value in row.items()
    }


def heldout_text(data: Dataset) -> bytes:
    """Decodes the held-out text of all sources."""
    texts = (
        data.tokenizer.decode_bytes(tokens.ids(0, tokens.size)) for tokens in data.heldout.values()
    )
    return b"".join(texts)


def measure_xz_bits_per_byte(data: Dataset) -> float:
    """Measures the bits a byte that `xz -9` needs for the held-out text.

    This is a yardstick that anyone can check, in the model's own unit.
    """
    text = heldout_text(data)
    return 8 * len(lzma.compress(text, preset=9)) / len(text)
