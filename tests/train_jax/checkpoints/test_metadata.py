import jax.numpy as jnp

from train_jax.checkpoints.manager import Checkpoints
from train_jax.checkpoints.metadata import meta_path, read_latest, read_metadata


def test_the_latest_step_is_read_as_orbax_wrote_it(tmp_path):
    folder = tmp_path / "checkpoints"
    assert read_latest(folder) is None and not folder.exists()
    checkpoints = Checkpoints(folder, "accuracy")
    assert read_latest(folder) is None
    for step, accuracy in [(9, 0.9), (10, 0.1)]:  # as text, 9 would be larger
        checkpoints.save(
            step,
            {"kernel": jnp.zeros(2)},
            {"count": jnp.int32(step)},
            {"step": step, "tries": 3},
            {"accuracy": accuracy},
        )
    checkpoints.close()
    (folder / "11.orbax-checkpoint-tmp-1").mkdir()  # from a killed save
    assert read_latest(folder) == (10, {"step": 10, "tries": 3})
    assert read_metadata(folder, 9) == {"meta": {"step": 9, "tries": 3}, "metrics": {"accuracy": 0.9}}
    assert meta_path(folder, 9).is_file()
