"""Training steps of flows divided over 8 devices, see tests/partitioned.py."""

import pytest

from tests import partitioned
from tests.paligemma_jax.mini import ROOT
from tests.partitioned import Case

FLOW_2D, FLOW_IMAGES = str(ROOT / "configs/flow_2d.py"), str(ROOT / "configs/flow_images.py")
PICTURES = {"batch_size": 16}
UNET = {"model.name": "unet", "model.unet.width": 16, "model.unet.head_width": 16, "model.unet.num_blocks": 1}
DIT = {"model.name": "dit", "model.dit.depth": 2, "model.dit.width": 64}
CASES = {
    "points": Case(FLOW_2D, {"batch_size": 4096, "model.width": 64}),
    "coupled": Case(
        FLOW_2D, {"batch_size": 1024, "model.width": 64, "coupling.name": "sinkhorn"}, ((1024,), (2, 1024))
    ),
    "unet": Case(FLOW_IMAGES, PICTURES | UNET),
    "dit": Case(FLOW_IMAGES, PICTURES | DIT),
}


@pytest.mark.parametrize("mesh", partitioned.MESHES)
@pytest.mark.parametrize("name", CASES)
def test_the_training_step_is_divided_over_devices(name, mesh, monkeypatch):
    partitioned.check(CASES[name], mesh, monkeypatch)
