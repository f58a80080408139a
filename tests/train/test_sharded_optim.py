"""Optimisers on 8 devices against one.

Run as a program, this file is the 8-device half of the comparison, because its process needs its
own number of devices.
"""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from optimizers import (
    MODEL,
    MODERN,
    OPTIMIZERS,
    SHAPES,
    draw,
    flat,
    gradients,
    make_optimizer,
    nest,
    optim,
    run,
)

from gpt_jax.sharding.mesh import make_mesh


def like_its_parameter(state, params) -> list[str]:
    """Paths of state arrays that are cut otherwise than their parameter.

    The paths of parameters without state are among them.
    """
    wrong = []
    seen = set()
    specs = {path: (p.shape, tuple(p.sharding.spec)) for path, p in flat(params).items()}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(keys, simple=True, separator="/")
        for path, (shape, spec) in specs.items():
            # A size of 1 is a placeholder of Adafactor.
            if name.endswith(path) and leaf.shape != (1,) and leaf.shape[1:] != (1,):
                seen.add(path)
                kept = [axis for n, axis in zip(shape, spec, strict=False) if n in leaf.shape]
                found = [
                    axis
                    for n, axis in zip(leaf.shape, tuple(leaf.sharding.spec), strict=False)
                    if n > 1
                ]
                wrong += [f"{name} {found} {kept}"] if found != kept else []
    return wrong + sorted(specs.keys() - seen)


def on_eight_devices():
    jax.config.update("jax_num_cpu_devices", 8)
    mesh = make_mesh(dict(data=2, fsdp=2, tensor=2))
    report = {}

    def place(tree):
        return nest(
            {
                path: jax.device_put(x, jax.NamedSharding(mesh, jax.P(*SHAPES[path][1])))
                for path, x in flat(tree).items()
            }
        )

    # Cautious decay looks at the sign of the update, and where that is rounding the sign is too:
    # one entry that flips is off by rate * decay. It works entry by entry, whatever the layout.
    smooth = MODERN | dict(muon_cautious=False)
    for name in OPTIMIZERS:
        o = optim(optimizer=name, **smooth)
        params = draw(0, MODEL)
        grads = gradients(MODEL)
        expected = run(make_optimizer(o, params), params, grads)[0]
        with jax.set_mesh(mesh):
            sharded = place(params)
            tx = make_optimizer(o, sharded)
            wrong = like_its_parameter(jax.jit(tx.init)(sharded), sharded)
            found, state = run(tx, sharded, [place(g) for g in grads])
            wrong += like_its_parameter(state, sharded)
            wrong += [
                path
                for path, x in flat(found).items()
                if x.sharding != flat(sharded)[path].sharding
            ]
        errors = [
            np.max(np.abs(np.asarray(x) - flat(expected)[path])) for path, x in flat(found).items()
        ]
        report[name] = {"error": float(max(errors)), "wrong": wrong}
    print(json.dumps(report))


@pytest.fixture(scope="module")
def eight_devices():
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sharded_is_unsharded(eight_devices, name):
    assert eight_devices[name]["error"] < 1e-5
    assert eight_devices[name]["wrong"] == []


if __name__ == "__main__":
    on_eight_devices()
