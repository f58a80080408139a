"""Train on batches of your own: sums of two numbers, made as they are needed.

    python examples/own_dataset.py

A batch is a dict of numpy columns [rows, tokens]. `weight` says where to learn: here the model
learns the answer, and not the question. The loop is short, because the train step is a function of
the state and a batch. Seen on two CPU cores: in batch 600 all digits of all answers are right.
"""

import jax
import numpy as np

from gpt_jax import config as configs, metrics, run, sharding

SIGNS = "0123456789+=."
ROWS, LENGTH = 64, 9  # "12+34=46." is the longest text


def make_batch(step: int) -> dict[str, np.ndarray]:
    """Batch `step`, always the same for the same step, so that a run can be repeated."""
    rng = np.random.default_rng(step)
    ids = np.full((ROWS, LENGTH + 1), SIGNS.index("."), np.int32)
    learn = np.zeros((ROWS, LENGTH + 1), np.float32)

    for row in range(ROWS):
        a, b = rng.integers(0, 50, 2)
        question, answer = f"{a}+{b}=", f"{a + b}."
        text = question + answer
        ids[row, : len(text)] = [SIGNS.index(sign) for sign in text]
        learn[row, len(question) : len(text)] = 1.0

    weight = learn[:, 1:]
    return {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "weight": weight,
        "bytes": weight.astype(np.int32),
    }


def main(steps: int = 600) -> list[float]:
    """Trains for `steps` steps and returns the accuracy of each."""
    config = configs.resolve(
        configs.Config(
            model=configs.Model(layers=2, embed=64, heads=4, vocab=len(SIGNS)),
            compute=configs.Compute(kernel="reference"),
            optim=configs.Optim(learning_rate=3e-3, warmup_steps=20),
            train=configs.Train(steps=steps, batch_size=ROWS, seq_len=LENGTH),
        )
    )
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    with jax.set_mesh(mesh):
        functions = run.make_steps(config, mesh)
        state = functions.make_state()
        accuracy = []
        for step in range(steps):
            batch = sharding.to_devices(mesh, make_batch(step), ROWS)
            state, sums = functions.train_step(state, batch)
            accuracy.append(metrics.divide_sums(jax.device_get(sums))["accuracy"])
            if step % 100 == 99:
                print(f"step {step + 1}: {accuracy[-1]:.1%} of the digits of the answers are right")
    return accuracy


if __name__ == "__main__":
    main()
