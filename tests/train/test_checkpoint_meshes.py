"""Checkpoints of one mesh and number of processes are read on others."""

import socket

from small_checkpoints import child, finish

from gpt_jax.train import read_meta

MESHES = """
def whole(step):
    rng = np.random.default_rng(step)
    w, b = rng.standard_normal((8, 16)), rng.standard_normal(16)
    return {"w": w.astype(np.float32), "b": b.astype(jnp.bfloat16), "n": np.int32(step)}
def place(tree, mesh, specs, make):
    lay = jax.sharding.NamedSharding
    return {k: make(v, lay(mesh, jax.P(*specs[k]))) for k, v in tree.items()}
def concrete(v, s):
    return jax.make_array_from_callback(np.shape(v), s, lambda i: np.asarray(v)[i])
def wanted(v, s):
    return jax.ShapeDtypeStruct(np.shape(v), v.dtype, sharding=s)
def expect(step, mesh, specs):
    params = place(whole(step), mesh, specs, wanted)
    train = place(whole(step + 1), mesh, specs, wanted)
    out = restore_checkpoint(directory, step, {"params": params, "train": train})
    for tree, full in ((out["params"], whole(step)), (out["train"], whole(step + 1))):
        for k, v in full.items():
            lay = jax.sharding.NamedSharding(mesh, jax.P(*specs[k]))
            assert tree[k].sharding == lay, (k, tree[k].sharding)
            for shard in tree[k].addressable_shards:
                ours = np.asarray(shard.data).tobytes()
                assert ours == np.asarray(v)[shard.index].tobytes(), (step, k)
def save(step, mesh, specs):
    with jax.set_mesh(mesh):
        policy = config.Checkpoint(every_minutes=1e-9, every_steps=0)
        saver = checkpoints.open_checkpoints(directory, policy)
        assert saver.should_save(step)
        params = place(whole(step), mesh, specs, concrete)
        saver.save(step, params, place(whole(step + 1), mesh, specs, concrete), {"step": step})
        saver.wait()
        assert manifest.find_damage(Path(directory) / str(step)) == ""
        saver.close()
"""
MESH_8 = """
mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"))
specs = dict(w=("fsdp", "tensor"), b=("tensor",), n=())
"""
MESH_4 = """
mesh = jax.make_mesh((4, 1), ("tensor", "fsdp"))
specs = dict(w=(None, "tensor"), b=(None,), n=())
"""
MESH_1 = 'mesh, specs = jax.make_mesh((1,), ("fsdp",)), dict(w=("fsdp",), b=(None,), n=())\n'
MESH_2X2 = 'mesh, specs = jax.make_mesh((4,), ("fsdp",)), dict(w=("fsdp",), b=("fsdp",), n=())\n'


def test_other_meshes_and_process_counts(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    finish(child(tmp_path, MESHES + MESH_8 + "save(1, mesh, specs)", devices=8))
    both = """
assert checkpoints.latest_valid(directory) == 1
expect(1, mesh, specs)
save(2, mesh, specs)
with jax.set_mesh(mesh):
    assert manifest.resolve_checkpoint(directory) == (Path(directory), 2)
expect(2, mesh, specs)
if jax.process_index() == 0:  # damaged for all processes when process 0 says so
    path = Path(directory) / "2" / manifest.META
    text = path.read_bytes()
    path.write_bytes(text[:-1])
lines = []
assert checkpoints.latest_valid(directory, lines.append) == 1
assert len(lines) == (jax.process_index() == 0)
try:
    manifest.resolve_checkpoint(directory, 2)
    raise AssertionError("no error")
except NoCheckpoint as error:
    assert "meta.json" in str(error)
if jax.process_index() == 0:
    path.write_bytes(text)
    def refuse(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    checkpoints.write_manifest = refuse
saver = checkpoints.open_checkpoints(directory, POLICY, lines.append)
arrays = place(whole(3), mesh, specs, concrete)
assert saver.save(3, arrays, {"n": arrays["n"]}, {})
try:
    saver.wait()  # the failure of process 0 reaches all
    raise AssertionError("no error")
except SaveFailed as error:
    assert "No space left" in str(error) and "step 2 is untouched" in str(error)
"""
    finish(
        *(
            child(
                tmp_path,
                f"jax.distributed.initialize('127.0.0.1:{port}', 2, {rank})\n"
                + MESHES
                + MESH_2X2
                + both,
                devices=2,
            )
            for rank in range(2)
        )
    )
    check = "expect(1, mesh, specs)\nexpect(2, mesh, specs)"
    finish(
        child(tmp_path, MESHES + MESH_1 + check),
        child(tmp_path, MESHES + MESH_4 + check, devices=4),
    )
    assert read_meta(tmp_path, 2)["step"] == 2
