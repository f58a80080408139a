"""Floating-point operations of a model, and the part of a peak that they reach (MFU)."""

from collections.abc import Sequence


def flops_per_token(
    matmul_params: int,
    windows: Sequence[int],
    attention_width: int,
    seq_len: int,
    causal: bool = False,
) -> int:
    """Returns the training FLOPs of one token, forward and backward.

    They are `6 matmul_params + sum over layers of 12 attention_width min(window or seq_len,
    seq_len)`. `matmul_params` counts every weight that is multiplied, so no looked-up embeddings.
    `windows` has one entry a layer, where 0 means all of the row. `attention_width` is heads *
    head_dim.

    The attention term counts the full map, or the whole window at every token. PaLM (2204.02311,
    appendix B), nanochat and Megatron count so too. With `causal` it counts the keys that a token
    really sees, as MaxText does. For a reach of w those are `w - w^2 / 2 seq_len` on average, half
    of the row without a window.
    """

    def count_keys(reach):
        return reach - reach**2 / (2 * seq_len) if causal else reach

    keys = sum(count_keys(min(window or seq_len, seq_len)) for window in windows)
    return 6 * matmul_params + round(12 * attention_width * keys)


def mfu(token_flops: float, tokens_per_second: float, peak: float) -> float:
    """Returns the model FLOPs utilisation of a whole run, 0 to 1.

    `tokens_per_second` are all of the run's, `peak` is that of all its devices together.
    """
    return token_flops * tokens_per_second / peak


def mfu_metrics(
    full_flops: float, causal_flops: float, tokens_per_second: float, peak: float | None
) -> dict[str, float]:
    """Returns the MFU by both conventions as metrics.

    Without a peak the dictionary is empty, so that the keys are absent rather than wrong.
    """
    if peak is None:
        return {}
    return {
        "throughput/mfu_full": mfu(full_flops, tokens_per_second, peak),
        "throughput/mfu_causal": mfu(causal_flops, tokens_per_second, peak),
    }
