import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from train_jax.core.errors import UserError
from train_jax.report.reporter import Reporter


@pytest.fixture
def clock(monkeypatch):
    """A clock that only changes when a test sets it."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(time, "perf_counter", lambda: Clock.now)
    return Clock


def read(workdir):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def read_events(workdir):
    """Reads TensorBoard's record files: length (8 bytes), its checksum (4), the event, its checksum (4)."""
    events = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            assert int.from_bytes(data[8:12], "little") == masked_crc32c(data[:8])
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return events


def test_every_line_is_json_with_a_step_and_nonfinite_values_are_named(tmp_path, capsys):
    reporter = Reporter(tmp_path, total_steps=20, progress="none")
    reporter.write(10, {"loss": jnp.float32(1.5), "skipped": 2})
    reporter.write(20, {"loss": float("nan"), "grad_norm": np.float32("inf"), "learning_rate": 1e-5})
    reporter.close()
    reporter.close()
    assert read(tmp_path) == [
        {"step": 10, "loss": 1.5, "skipped": 2},
        {"step": 20, "loss": None, "grad_norm": None, "learning_rate": 1e-5, "nonfinite": ["loss", "grad_norm"]},
    ]
    assert capsys.readouterr() == ("", "")


def test_resuming_drops_the_lines_after_the_checkpoint(tmp_path):
    first = Reporter(tmp_path, 40, progress="none")
    for step in (10, 20, 30):
        first.write(step, {"loss": float(step)})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')  # cut off by a kill

    resumed = Reporter(tmp_path, 40, start_step=20, progress="none")
    for step in (30, 40):
        resumed.write(step, {"loss": float(step)})
    resumed.close()
    straight = [{"step": step, "loss": float(step)} for step in (10, 20, 30, 40)]
    assert read(tmp_path) == straight
    marks = [event.step for event in read_events(tmp_path) if event.HasField("session_log")]
    assert marks[-1] == 21  # TensorBoard hides this and later steps of earlier files

    Reporter(tmp_path, 40, progress="none").close()  # from scratch
    assert read(tmp_path) == []


def test_plain_lines_have_rate_and_remaining_time(tmp_path, capsys, clock):
    reporter = Reporter(tmp_path, 100, examples_per_step=8, progress="plain")
    clock.now += 60  # compiles
    reporter.tick(1)
    clock.now += 2
    reporter.tick(11)
    with reporter.paused():
        clock.now += 300  # evaluates
    reporter.write(11, {"loss": 0.123456})
    assert capsys.readouterr().out == "step 11/100 (11 %)  loss 0.1235  5 steps/s  40 examples/s  00:17 left\n"
    assert read(tmp_path) == [{"step": 11, "loss": 0.123456, "steps_per_second": 5.0, "examples_per_second": 40.0}]
    clock.now += 10
    reporter.write(31, {"loss": 0.5})
    assert capsys.readouterr().out == "step 31/100 (31 %)  loss 0.5  2 steps/s  16 examples/s  00:34 left\n"
    reporter.close()


def test_a_bar_is_shown_if_requested_or_on_a_terminal(tmp_path, capsys, monkeypatch):
    reporter = Reporter(tmp_path, 100, start_step=50, examples_per_step=2, progress="bar")
    for step in (51, 52):
        reporter.tick(step)
    reporter.write(52, {"loss": 0.25})
    reporter.say("a word")
    reporter.close()
    out, err = capsys.readouterr()
    assert "52/100" in err and "loss 0.25" in err and "examples/s" in err
    assert out == "a word\n"

    Reporter(tmp_path, 100, progress="auto").tick(1)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    auto = Reporter(tmp_path, 100, progress="auto")
    auto.close()
    assert "0/100" in capsys.readouterr().err
    with pytest.raises(UserError, match="progress is 'rich', expected one of auto, bar, plain, none"):
        Reporter(tmp_path, 100, progress="rich")


def test_validation_logs_every_number_and_shows_the_top_level(tmp_path, capsys):
    reporter = Reporter(tmp_path, 100, progress="plain")
    results = {"accuracy": np.float32(0.5), "rouge": {"f1": 0.25}, "split": "val", "loss": float("nan"), "ok": True}
    reporter.write_validation(50, results)
    reporter.close()
    line = {"step": 50, "eval/accuracy": 0.5, "eval/rouge/f1": 0.25, "eval/loss": None, "nonfinite": ["eval/loss"]}
    assert read(tmp_path) == [line]
    assert capsys.readouterr().out == "step 50/100  eval/accuracy 0.5  eval/loss nan\n"


def test_tensorboard_holds_the_scalars(tmp_path):
    reporter = Reporter(tmp_path, 10, progress="none")
    reporter.write(5, {"loss": 0.5})
    reporter.write_validation(6, {"accuracy": 0.75})
    reporter.close()
    points = {
        (value.tag, event.step, value.simple_value) for event in read_events(tmp_path) for value in event.summary.value
    }
    assert points == {("loss", 5, 0.5), ("eval/accuracy", 6, 0.75)}


def test_other_processes_write_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    reporter = Reporter(tmp_path / "run", 10, progress="bar")
    reporter.tick(1)
    reporter.write(1, {"loss": 1.0})
    reporter.write_validation(1, {"loss": 1.0})
    reporter.say("a word")
    reporter.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")
