"""Log-probabilities of given text: by iota = by gather, on one device and on a mesh that splits the vocabulary."""

import jax
import numpy as np

from gpt_jax import sharding
from gpt_jax.infer.score import token_logprobs

LOGITS = np.random.default_rng(0).standard_normal((4, 5, 8)).astype(np.float32) * 3
TARGETS = np.random.default_rng(1).integers(0, 8, (4, 5)).astype(np.int32)


def expected():
    gathered = np.take_along_axis(jax.nn.log_softmax(LOGITS), TARGETS[..., None], axis=-1)
    return gathered[..., 0]


def forward(params, batch):
    return sharding.constrain(params, "batch", "seq", "vocab")


def test_equals_log_softmax_and_gather():
    found = token_logprobs(forward, LOGITS, {"targets": TARGETS})
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected(), rtol=1e-5, atol=1e-6)


def test_vocabulary_over_devices(mesh):
    devices = mesh(2, 1, 4)
    with jax.set_mesh(devices):
        columns = sharding.to_devices(devices, {"targets": TARGETS}, 4)
        found = jax.jit(lambda p, b: token_logprobs(forward, p, b))(LOGITS, columns)
    np.testing.assert_allclose(found, expected(), rtol=1e-5, atol=1e-6)
