"""What `gpt-jax plan` says of what lies in the memory of the host."""

from plans import read_plan, run_plan


def test_what_offload_costs_is_not_counted_and_said(capsys):
    words = "config.compute.remat = 'offload': its copies"
    run_plan("tiny", "v5e:2x2", "--config.mesh.data=4", "--config.compute.remat=block")
    assert words not in capsys.readouterr().out

    overrides = ["--config.mesh.data=4", "--config.compute.remat=offload"]
    run_plan("tiny", "v5e:2x2", *overrides)
    assert words in capsys.readouterr().out
    run_plan("tiny", "v5e:2x2", *overrides, "--json")
    assert read_plan(capsys)["notes"][0].startswith(words)


def test_what_is_on_the_host_is_shown(capsys):
    """A search sets remat itself, so names are not in its command."""
    words = ["remat=names", "remat_save=q", "remat_offload=layer_in"]
    overrides = ["--config.mesh.data=4", *(f"--config.compute.{word}" for word in words)]
    overrides.append("--config.optim.state_memory=host")
    run_plan("tiny", "v5e:2x2", *overrides)
    shown = capsys.readouterr().out
    assert "remat names (q; on the host layer_in)" in shown
    assert "on the host, for each device: optimizer" in shown

    run_plan("tiny", "v5e:2x2", *overrides, "--json", "--search=1")
    report = read_plan(capsys)
    assert report["remat"] != "names"
    assert "names" not in report["arithmetic"]["activations_by_remat"]
    assert "remat_save" not in report["command"]
    assert "--config.optim.state_memory=host" in report["command"]
