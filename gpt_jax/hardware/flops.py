"""Floating-point operations of a model, and the part of a chip's peak that they reach (MFU)."""

from collections.abc import Sequence


def flops_per_token(
    matmul_params: int,
    windows: Sequence[int],
    attention_width: int,
    seq_len: int,
    causal: bool = False,
) -> int:
    """Training FLOPs (forward and backward) of one token: `6 N + sum over layers of 12 width
    min(window or T, T)`.

    `matmul_params`: N, every weight that is multiplied (looked-up embeddings excluded).
    `windows`: one entry a layer, 0 meaning all of T. `attention_width`: heads * head_dim. The
    attention term counts the full T x T map, or the whole window at every token, as PaLM
    (2204.02311, appendix B), nanochat and Megatron do; `causal` counts the keys that there are,
    `w - w^2 / 2T` on average for a reach of w, which for w = T is the half that MaxText counts."""
    reaches = [min(window or seq_len, seq_len) for window in windows]
    keys = sum(reach - reach**2 / (2 * seq_len) if causal else reach for reach in reaches)
    return 6 * matmul_params + round(12 * attention_width * keys)


def mfu(token_flops: float, tokens_per_second: float, peak: float | None) -> float | None:
    """Model FLOPs utilisation, 0 to 1, of a whole run: all its tokens a second over all its
    devices' `peak`."""
    return None if peak is None else token_flops * tokens_per_second / peak


def mfu_metrics(
    full_flops: float, causal_flops: float, tokens_per_second: float, peak: float | None
) -> dict[str, float]:
    """Both conventions as metrics; empty when the peak is unknown, so that the keys are absent
    rather than wrong."""
    if peak is None:
        return {}
    return {
        "throughput/mfu_full": mfu(full_flops, tokens_per_second, peak),
        "throughput/mfu_causal": mfu(causal_flops, tokens_per_second, peak),
    }
