"""What an error offers in the place of settings that do not fit the devices works."""

import pytest
from small_configs import fault_lines, made, refuses

from gpt_jax import config


def test_meshes_that_the_model_cannot_run_on_are_not_offered():
    sections = dict(model=dict(heads=3, kv_heads=3, embed=24), mesh=dict(data=1, fsdp=2, tensor=3))
    message = refuses(lambda: config.check(made(**sections), devices=8), "config.mesh.tensor = 3")
    assert message.endswith("the nearest that do: config.mesh.fsdp=8 config.mesh.tensor=1")


def test_sizes_across_slices_are_offered_last():
    """They come last because the machine decides them."""
    for mesh, offers in (
        (dict(fsdp=3, dcn_data=2), "config.mesh.fsdp=4"),
        (dict(data=4, dcn_data=4), "config.mesh.data=2"),
        (dict(data=1, dcn_data=3), "config.mesh.dcn_data=8"),
    ):
        message = refuses(
            lambda: config.check(made(mesh=dict(data=1) | mesh), devices=8), "config.mesh.dcn_data"
        )
        assert message.endswith(f"the nearest that do: {offers}"), message


@pytest.mark.parametrize(
    "batch, accumulate, data, fsdp",
    [
        (9, 1, 8, 1),
        (12, 2, 2, 4),
        (4, 1, 8, 1),
        (6, 3, 1, 8),
        (20, 2, 4, 2),
        (1, 1, 2, 4),
        (48, 12, 2, 4),
        (8, 8, 8, 1),
    ],
)
def test_the_batch_size_that_the_error_suggests_works(batch, accumulate, data, fsdp):
    def sections(size):
        return dict(
            train=dict(batch_size=size, accumulate=accumulate), mesh=dict(data=data, fsdp=fsdp)
        )

    words = f"config.train.batch_size = {batch}"
    message = next(line for line in fault_lines(made(**sections(batch))) if line.startswith(words))
    suggested, _, fewer = message.rsplit("try ", 1)[1].partition(", or config.train.accumulate=")
    suggested = int(suggested)
    assert bool(fewer) == (batch % (data * fsdp) == 0)
    if fewer:
        config.check(
            made(train=dict(batch_size=batch, accumulate=int(fewer)), mesh=sections(batch)["mesh"]),
            devices=8,
        )
    assert batch < suggested < batch + 8 * accumulate
    config.check(made(**sections(suggested)), devices=8)
