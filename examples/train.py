"""Train a small model from Python, open its checkpoint, and let it write.

    python examples/train.py

A config is plain dataclasses here. The workdir holds the same files as that of `gpt-jax train`, so
every command works on it, and calling `main` again resumes.
"""

from pathlib import Path

import jax

from gpt_jax import config as configs, infer, run

PAGES = Path(__file__).resolve().parents[1] / "docs"  # a text that is at hand


def make_config(steps: int) -> configs.Config:
    """Two layers on the bytes of this repository's pages."""
    return configs.Config(
        model=configs.Model(layers=2, embed=96, heads=4, position="rotary", norm="rmsnorm"),
        data=configs.Data(path=(str(PAGES),), tokenizer="bytes", split="document"),
        optim=configs.Optim(learning_rate=3e-3, warmup_steps=10),
        train=configs.Train(steps=steps, batch_size=8, seq_len=128),
        eval=configs.Eval(batches=4, sample_tokens=40, sample_prompts=("The ",)),
        log=configs.Log(tensorboard=False),
    )


def main(workdir: str = "runs/from_python", steps: int = 300) -> list[str]:
    """Trains, then returns two continuations of a prompt."""
    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    run.run_training(run.build(make_config(steps)), folder)

    loaded = run.load_model(workdir, 0, print, devices=1)
    sampling = infer.Sampling(max_new_tokens=60, temperature=0.7, num_samples=2)
    with jax.set_mesh(loaded.mesh):
        done = infer.generate(
            loaded.config.model,
            loaded.config.compute,
            loaded.params,
            loaded.tokenizer,
            ["The run "],
            sampling,
            print,
        )
    for completion in done:
        print(repr("The run " + completion.text))
    return [completion.text for completion in done]


if __name__ == "__main__":
    main()
