import json

import numpy as np
from PIL import Image

from train_jax.report import plots
from train_jax.report.figure_text import drawable

RECORDS = [
    {"step": 10, "loss": 3.0, "learning_rate": 1e-4, "grad_norm": 2.0, "examples_per_second": 90.0},
    {"step": 20, "loss": None, "learning_rate": 2e-4, "grad_norm": None, "nonfinite": ["loss", "grad_norm"]},
    {"step": 20, "eval/loss": 2.5, "eval/accuracy": 0.4, "eval/accuracy_by_family/count": 0.3, "eval/fid": 30.0},
    {"step": 30, "loss": 2.0, "learning_rate": 1e-4, "grad_norm": 1.0},
]


def write(folder, records):
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_curves_have_every_number_at_its_step(tmp_path):
    curves = plots.read_curves(write(tmp_path, RECORDS))
    assert curves["loss"] == ([10, 30], [3.0, 2.0])
    assert curves["learning_rate"] == ([10, 20, 30], [1e-4, 2e-4, 1e-4])
    assert curves["eval/accuracy"] == ([20], [0.4])
    assert "nonfinite" not in curves and "step" not in curves


def test_panels_join_losses_and_scores_and_leave_details_out(tmp_path):
    assert plots.panels(plots.read_curves(write(tmp_path, RECORDS))) == {
        "loss": ["loss", "eval/loss"],
        "evaluation scores": ["eval/accuracy"],
        "learning rate": ["learning_rate"],
        "grad norm": ["grad_norm"],
        "eval/fid": ["eval/fid"],
    }


def test_every_panel_has_a_curve(tmp_path):
    plots.plot_curves(write(tmp_path, RECORDS), tmp_path / "curves.png", title="a run")
    pixels = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB")).astype(int)
    coloured = (pixels.max(-1) - pixels.min(-1)) > 60  # lines and points; frames and text are grey
    height, width = coloured.shape
    assert width > height > 400
    cells = [coloured[row * height // 3 : (row + 1) * height // 3] for row in range(3)]
    inked = [cell[:, half].any() for cell in cells for half in (slice(0, width // 2), slice(width // 2, None))]
    assert inked == [True] * 5 + [False]  # five panels, the sixth place is empty


def test_characters_that_the_font_lacks_are_replaced():
    assert drawable("a $5\x13\n\u4e2d") == "a $5\ufffd\n\ufffd"


def test_without_metrics_no_figure_is_written(tmp_path):
    plots.plot_curves(write(tmp_path, []), tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()
