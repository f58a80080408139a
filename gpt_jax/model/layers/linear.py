"""The small parts of a transformer: matmuls, norms, embeddings, positions, feed-forwards (called by
model/).

Shapes: B batch, T sequence, D embed, N heads, H head_dim, F mlp, V vocab. Parameters are float32;
`dtype` is what is multiplied; norms, softmax and logits are summed in float32.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax import config, sharding
from gpt_jax.model.parametrization import make_init


def matmul(
    x: jax.Array, kernel: jax.Array, out_axis: str | None, precise=None, seq: str = "seq"
) -> jax.Array:
    """x [B, T, D] @ kernel [D, F] -> [B, T, F]; `seq`: how the result's T is laid out,
    `precise`: its dtype. Where no mesh axis cuts T, on activations flattened to two dims: XLA's
    CPU backend runs the backward pass of the three-dim form at half the speed, and no other
    backend minds."""
    if sharding.count_parts(seq) > 1 or sharding.is_gathered(kernel):
        layout, whole = (sharding.out_spec("batch", over, out_axis) for over in (seq, "seq"))
        return (
            _matmul(x, kernel, precise, layout)
            if layout == whole
            else _scattered(x, kernel, precise, layout, whole)
        )
    rows = x.reshape(-1, x.shape[-1])
    y = jnp.matmul(
        rows,
        kernel,
        preferred_element_type=precise,
        out_sharding=sharding.out_spec("batch", out_axis),
    )
    return sharding.reshape(y, (*x.shape[:-1], kernel.shape[-1]), "batch", seq, out_axis)


def _matmul(x, kernel, precise, layout):
    return jnp.matmul(x, kernel, preferred_element_type=precise, out_sharding=layout)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _scattered(x, kernel, precise, layout, whole):
    """`_matmul` whose result is cut along T (`layout`) where x is not (`whole`). Backward the
    result's gradient is gathered first: JAX 0.10 has no transpose for kernels that
    `sharding.use` has gathered."""
    return _matmul(x, kernel, precise, layout)


def _scattered_backward(precise, layout, whole, saved, g):
    return jax.vjp(lambda x, kernel: _matmul(x, kernel, precise, whole), *saved)[1](
        jax.reshard(g, whole)
    )


_scattered.defvjp(
    lambda x, kernel, *how: (_scattered(x, kernel, *how), (x, kernel)), _scattered_backward
)


class Weights(nn.Module):
    """Kernel [in, features] and bias [features] (None without one) of a linear map, in the
    compute dtype and laid out for use; `axes` are the kernel's logical axes."""

    features: int
    axes: tuple[str, str]
    role: str
    model: config.Model
    compute: config.Compute
    bias: bool

    @nn.compact
    def __call__(self, width: int):
        dtype = jnp.dtype(self.compute.dtype)
        init = sharding.stored_init(make_init(self.role, self.model), self.axes)
        kernel = sharding.use_weight(
            self.param("kernel", init, (width, self.features)), self.axes, dtype
        )
        if not self.bias:
            return kernel, None
        bias = self.param(
            "bias", sharding.stored_init(nn.initializers.zeros, self.axes[1:]), (self.features,)
        )
        return kernel, sharding.constrain(bias.astype(dtype), *self.axes[1:])


def project(x: jax.Array, *maps: Weights) -> list[jax.Array]:
    """x [B, T, in] through several linear maps -> one [B, T, features] each. On a CPU the
    kernels are joined into one matmul where no mesh axis splits the features: 5 % of a small
    step; a TPU loses a sixth of a large one by it (joining, cutting, and a matmul at half the
    speed, by the compiler's cycles). With `shard_sequence` the stream is gathered over tensor on
    the way in and scattered on the way out (Korthikanti et al. 2022)."""
    inside, compute = maps[0].axes[0], maps[0].compute
    back = inside in ("heads", "mlp")  # to the stream: the sum over tensor ends here
    if compute.shard_sequence and not back:
        x = sharding.constrain(x, "batch", "seq", None)
    weights = [linear(x.shape[-1]) for linear in maps]
    if len(maps) > 1 and sharding.axis_size("tensor") == 1 and sharding.platform() == "cpu":
        ends = np.cumsum([linear.features for linear in maps])[:-1]
        parts = jnp.split(
            matmul(x, jnp.concatenate([kernel for kernel, _ in weights], 1), None), ends, -1
        )
    else:
        parts = [
            matmul(x, kernel, linear.axes[1], seq=compute.stream if back else "seq")
            for linear, (kernel, _) in zip(maps, weights)
        ]
    return [y if bias is None else y + bias for y, (_, bias) in zip(parts, weights)]
