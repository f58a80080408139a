"""The transformer in plain numpy and float64, a row and a head at a time, for comparison.

It shares no code with gpt_jax. Parameters come as the documented tree of paths. The rules are those
of a textbook: rotation by complex numbers, frequencies by wavelength, masks as a function of two
positions. Shapes: T sequence, D embed, H head_dim, V vocab.
"""

import math

import jax
import numpy as np

ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "swiglu": lambda x: x / (1 + np.exp(-x)),
}
ACTIVATIONS["geglu"] = ACTIVATIONS["gelu_tanh"]


RMS_NORMS = ("rmsnorm", "plain_rmsnorm", "unit_rmsnorm")


def np_norm(model, p, x):
    if model.norm == "layernorm":
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + model.norm_epsilon)
    elif model.norm in RMS_NORMS:
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + model.norm_epsilon)
    else:
        raise ValueError(f"np_norm knows no {model.norm}: write it here")
    return x * np_scale(model, p) + p.get("bias", 0.0)


def np_scale(model, p):
    if "scale" not in p:
        return 1.0
    return 1 + p["scale"] if model.norm == "unit_rmsnorm" else p["scale"]


def np_dense(p, x):
    return x @ p["kernel"] + p.get("bias", 0.0)


def np_cap(x, cap):
    return cap * np.tanh(x / cap) if cap else x


def np_frequencies(model, is_local=False):
    """Rotary frequencies by wavelength, as in the reference code of Llama 3."""
    base = model.rope_local_base if is_local else model.rope_base
    factor = 1 if is_local else model.rope_scale_factor
    rotating = int(model.head_dim * model.rope_fraction)
    frequencies = []

    for i in range(rotating // 2):
        frequency = 1 / base ** (2 * i / rotating)
        if model.rope_scaling == "linear":
            frequency /= factor
        elif factor > 1:
            original = model.rope_scale_original_seq
            wavelength = 2 * math.pi / frequency
            if wavelength > original / model.rope_scale_low:
                frequency /= factor
            elif wavelength > original / model.rope_scale_high:
                smooth = (original / wavelength - model.rope_scale_low) / (
                    model.rope_scale_high - model.rope_scale_low
                )
                frequency = (1 - smooth) * frequency / factor + smooth * frequency
        frequencies.append(frequency)
    return np.array(frequencies)


def np_rotate(model, x, position, is_local):
    """Rotates x [T, H].

    Channels i and i + R / 2 are one complex number, which is turned by position * frequency.
    """
    frequencies = np_frequencies(model, is_local)
    half = len(frequencies)
    turned = (x[:, :half] + 1j * x[:, half : 2 * half]) * np.exp(
        1j * position[:, None] * frequencies
    )
    return np.concatenate([turned.real, turned.imag, x[:, 2 * half :]], axis=-1)


def np_sinusoids(model, position):
    rates = 10_000.0 ** -(np.arange(0, model.embed, 2) / model.embed)
    angles = position[:, None] * rates
    return np.concatenate([np.sin(angles), np.cos(angles)], -1)[:, : model.embed]


def np_qk(model, p, x, position, is_local):
    """Queries or keys [T, H] after position and norm, in the order of the config."""

    def normed(x):
        if model.qk_norm_over == "all":
            return x
        root = np.sqrt((x**2).mean(-1, keepdims=True) + model.norm_epsilon)
        return x / root * np_scale(model, p) * model.qk_scale

    if model.qk_norm and not model.qk_norm_after_rope:
        x = normed(x)
    if model.position == "rotary":
        x = np_rotate(model, x, position, is_local)
    if model.qk_norm and model.qk_norm_after_rope:
        x = normed(x)
    return x


def np_attention(model, p, x, window, tokens, position, allowed):
    """The attention of one row [T, D]. `allowed(t, s)` is the mask without the window."""
    q, k, v = (np_dense(p[name], x) for name in "qkv")
    if "value_embed" in p:
        strength = 3 / (1 + np.exp(-(x[:, : model.value_embed_gate] @ p["value_gate"]["kernel"])))
        v = v + np.repeat(strength, model.head_dim, axis=1) * p["value_embed"]["table"][tokens]
    if model.qk_norm and model.qk_norm_over == "all":
        q, k = (np_norm(model, p[f"{name}_norm"], y) for name, y in (("q", q), ("k", k)))
    H = model.head_dim
    scale = model.attention_scale or 1 / math.sqrt(H)
    is_local = window > 0 and model.rope_local_base > 0
    outs = []

    def looks(t, s):
        return allowed(t, s) and not (window and t - s >= window)

    mask = np.array([[looks(t, s) for s in range(len(x))] for t in range(len(x))])
    for n in range(model.heads):
        kv = n // (model.heads // model.kv_heads)

        def cut(y, i):
            return y[:, i * H : (i + 1) * H]

        query = np_qk(model, p.get("q_norm", {}), cut(q, n), position, is_local)
        key = np_qk(model, p.get("k_norm", {}), cut(k, kv), position, is_local)
        scores = np.where(mask, np_cap(query @ key.T * scale, model.attention_softcap), -1e30)
        probs = np.exp(scores - scores.max(-1, keepdims=True))
        outs.append(probs / probs.sum(-1, keepdims=True) @ cut(v, kv))
    return np_dense(p["out"], np.concatenate(outs, -1))


def np_mlp(ffn, p, x):
    gate = np_dense(p["gate"], x) if "gate" in p else None
    up = np_dense(p["up"], x)
    return np_dense(
        p["down"], ACTIVATIONS[ffn](up) if gate is None else ACTIVATIONS[ffn](gate) * up
    )


def np_layer(params, i):
    blocks = params["blocks"]
    repeats = len(jax.tree.leaves(blocks)[0])
    if i >= len(blocks) * repeats:
        return params["tail"][str(i - len(blocks) * repeats)]
    return jax.tree.map(lambda x: x[i // len(blocks)], blocks[str(i % len(blocks))])


def np_row(model, params, tokens, position, allowed):
    """Logits [T, V] of one row."""
    x = params["embed"]["table"][tokens] * model.embed_scale
    if model.position == "learned":
        x = x + params["position"]["table"][position]
    if model.position == "sinusoidal":
        x = x + np_sinusoids(model, position)
    x = x0 = np_norm(model, params.get("embed_norm", {}), x) if model.embed_norm else x
    if model.smear:  # the token before, of the same document
        p = params["smear"]
        gate = p["factor"]["scale"] / (
            1 + np.exp(-(x[:, : model.smear_gate] @ p["gate"]["kernel"]))
        )
        x = x0 = np.stack(
            [x[t] + (gate[t] * x[t - 1] if t and allowed(t, t - 1) else 0) for t in range(len(x))]
        )
    for i in range(model.layers):
        p = np_layer(params, i)
        window = model.windows[i % len(model.windows)]
        window = 0 if i == model.layers - 1 and model.last_window_full else window
        if model.residual_scalars:
            x = params["residual"]["x"][i] * x + params["residual"]["x0"][i] * x0
        parts = (
            (
                "mixer_norm",
                lambda y: np_attention(model, p["attention"], y, window, tokens, position, allowed),
            ),
            ("mlp_norm", lambda y: np_mlp(model.pattern[i % len(model.pattern)][1], p["mlp"], y)),
        )
        before = x
        for name, part in parts:

            def norm(y):
                return np_norm(model, p.get(name, {}), y)

            def out_norm(y):
                return np_norm(model, p[name.replace("_norm", "_out_norm")], y)

            read = before if model.parallel and name == "mlp_norm" else x
            x = {
                "pre": lambda: x + part(norm(read)),
                "post": lambda: norm(x + part(x)),
                "sandwich": lambda: x + out_norm(part(norm(x))),
                "branch": lambda: x + out_norm(part(x)),
            }[model.norm_position]()
        if i == model.layers // 2:
            half = x
    x = x - params["backout"]["scale"] * half if model.backout else x
    x = np_norm(model, params.get("final_norm", {}), x) if model.final_norm else x
    logits = x @ (params["embed"]["table"].T if model.tied else params["head"]["kernel"])
    return np_cap(logits, model.logit_softcap)
