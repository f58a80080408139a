"""How every array of the presets lies on a mesh, parameters and optimiser state, against recorded
files.

An array that is no longer cut, or cut otherwise, changes a line. After an intended change
    python tests/model/test_layouts.py
writes tests/model/layouts/*.txt anew. Look at the difference before you commit it.
"""

from dataclasses import replace
from pathlib import Path

import jax
import pytest

from gpt_jax import config as configs
from gpt_jax.commands import config_file
from gpt_jax.run import parts as run_parts
from gpt_jax.sharding.mesh import make_mesh

FOLDER = Path(__file__).with_name("layouts")
PRESETS = {
    "gpt2:1558m": dict(fsdp=8),
    "llama:8b": dict(fsdp=4, tensor=2),
    "llama:70b": dict(pipeline=2, fsdp=2, tensor=2),
    "modern:d26": dict(data=2, fsdp=4),
    "moe:8x7b": dict(expert=4, tensor=2),
}


def text(preset: str) -> str:
    """A line for each array: path, shape, the mesh axes of each dim."""
    name, variant = preset.split(":")
    shape = PRESETS[preset]
    config = config_file.load_config(f"{FOLDER.parents[2]}/configs/{name}.py:{variant}", [])
    config = configs.resolve(
        replace(config, compute=replace(config.compute, kernel="reference")), 32_768
    )
    mesh = make_mesh(shape, jax.devices()[:8])
    leaves = jax.tree_util.tree_leaves_with_path(run_parts.make_steps(config, mesh).abstract)

    def row(path, x):
        return (
            f"{jax.tree_util.keystr(path, simple=True, separator='/')} "
            f"{','.join(map(str, x.shape)) or '-'} {','.join(map(axes, x.sharding.spec)) or '-'}\n"
        )

    def axes(part):
        return "+".join(part) if isinstance(part, tuple) else part or "."

    return f"# {preset} on {shape}: path, shape, mesh axes\n" + "".join(
        sorted(row(*leaf) for leaf in leaves)
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_layout_is_as_recorded(preset):
    assert (
        text(preset).splitlines()
        == (FOLDER / f"{preset.replace(':', '_')}.txt").read_text().splitlines()
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_nothing_large_is_whole(preset):
    """An array of a million entries or more is cut over the mesh, in the recorded files too."""
    for line in (FOLDER / f"{preset.replace(':', '_')}.txt").read_text().splitlines()[1:]:
        _, shape, axes = line.rsplit(" ", 2)
        size = 1
        for n in shape.split(","):
            size *= int(n.replace("-", "1"))
        sized = set(PRESETS[preset]) & set(axes.replace("+", ",").split(","))
        assert size < 1 << 20 or sized, line


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    for each in PRESETS:
        (FOLDER / f"{each.replace(':', '_')}.txt").write_text(text(each))
