"""The keys of rotary positions, in the spelling of transformers 5 and in the older ones."""

from collections.abc import Mapping
from typing import Any

from gpt_jax import config
from gpt_jax.errors import UsageError
from gpt_jax.interop.keys import Key, take


def _read_scaling(rope: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Our fields for the scaling of rotary frequencies."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return {}
    if kind == "linear":
        return {"rope_scaling": "linear", "rope_scale_factor": float(take(rope, "factor"))}
    if kind == "llama3":
        return {
            "rope_scaling": "llama3",
            "rope_scale_factor": float(take(rope, "factor")),
            "rope_scale_low": float(take(rope, "low_freq_factor")),
            "rope_scale_high": float(take(rope, "high_freq_factor")),
            "rope_scale_original_seq": int(take(rope, "original_max_position_embeddings")),
        }
    raise UsageError(
        f"config.json: {where} of type {kind!r} is not supported; known: default, linear, llama3"
    )


def _write_scaling(model: config.Model) -> dict[str, Any] | None:
    if model.rope_scale_factor == 1:
        return None
    if model.rope_scaling == "linear":
        return {"rope_type": "linear", "factor": model.rope_scale_factor}
    return {
        "rope_type": "llama3",
        "factor": model.rope_scale_factor,
        "low_freq_factor": model.rope_scale_low,
        "high_freq_factor": model.rope_scale_high,
        "original_max_position_embeddings": model.rope_scale_original_seq,
    }


def _refuse_two_scalings(values):
    if values.get("rope_parameters") and values.get("rope_scaling"):
        raise UsageError(
            "config.json: has rope_parameters and rope_scaling; leave out the one that is not meant"
        )


def _read_rope(values):
    """Rotary positions, from `rope_parameters` (transformers 5) or the two keys before it."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    _refuse_two_scalings(values)
    base = rope.get("rope_theta") or values.get("rope_theta") or values.get("rotary_emb_base")
    part = rope.get("partial_rotary_factor") or values.get("partial_rotary_factor")
    part = part or values.get("rotary_pct") or 1.0
    fields = {
        "position": "rotary",
        "rope_base": float(base or 10_000),
        "rope_fraction": float(part),
    }
    return fields | _read_scaling(rope, "rope_parameters")


def _write_rope(model):
    """The older keys, which every version of transformers reads."""
    keys: dict[str, Any] = {"rope_theta": model.rope_base, "rope_scaling": _write_scaling(model)}
    if model.rope_fraction != 1:
        keys["partial_rotary_factor"] = model.rope_fraction
    return keys


ROPE = Key(
    (
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "rotary_emb_base",
        "partial_rotary_factor",
        "rotary_pct",
    ),
    _read_rope,
    _write_rope,
)


def _read_two_ropes(values):
    """Gemma 3: layers with a window rotate by a base of their own."""
    by_kind = values.get("rope_parameters")
    _refuse_two_scalings(values)
    if by_kind:
        full = take(by_kind, "full_attention")
        local = take(by_kind, "sliding_attention")
    else:
        full = {"rope_theta": values.get("rope_theta"), **(values.get("rope_scaling") or {})}
        local = {"rope_theta": values.get("rope_local_base_freq")}
    if _read_scaling(local, "sliding_attention of rope_parameters"):
        raise UsageError("config.json: layers with a window have scaled frequencies; ours have not")
    fields = {
        "position": "rotary",
        "rope_base": float(full.get("rope_theta") or 1_000_000),
        "rope_local_base": float(local.get("rope_theta") or 10_000),
    }
    return fields | _read_scaling(full, "rope_parameters")


def _write_two_ropes(model):
    return {
        "rope_theta": model.rope_base,
        "rope_local_base_freq": model.rope_local_base or model.rope_base,
        "rope_scaling": _write_scaling(model),
    }


TWO_ROPES = Key(
    ("rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq"),
    _read_two_ropes,
    _write_two_ropes,
)
