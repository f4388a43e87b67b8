from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

from train_jax.report import startup

TRAINABLE = {"decoder/q/lora_a": jnp.ones((4, 2)), "decoder/q/lora_b": jnp.ones((2, 4)), "projector/bias": jnp.ones(3)}
FROZEN = {
    "decoder/q/kernel": jnp.ones((4, 4), jnp.bfloat16),
    "vision/kernel": jax.ShapeDtypeStruct((10, 100), "float32"),
}


def test_counts_per_module():
    state = {"optimizer": optax.adam(1e-3).init(TRAINABLE), "guard": jnp.zeros((), jnp.int32)}
    assert startup.count_parameters(TRAINABLE, FROZEN, state) == {
        "decoder": {"trainable": (16, 64), "frozen": (16, 32), "optimizer": (32, 128)},
        "projector": {"trainable": (3, 12), "frozen": (0, 0), "optimizer": (6, 24)},
        "vision": {"trainable": (0, 0), "frozen": (1000, 4000), "optimizer": (0, 0)},
        "other": {"trainable": (0, 0), "frozen": (0, 0), "optimizer": (2, 8)},  # two step counters
    }


def test_packed_weights_count_parameters_not_elements():
    packed = {"decoder/kernel/codes": jnp.ones((4, 4), jnp.uint8), "decoder/kernel/absmax": jnp.ones((4, 1))}
    counts = {"decoder/kernel/codes": 32, "decoder/kernel/absmax": 0}
    assert startup.count_parameters({}, packed, (), counts)["decoder"]["frozen"] == (32, 32)
    assert "32 (32 B)" in startup.startup_report({}, packed, (), counts=counts)


def test_table_has_a_row_per_module_and_totals():
    table = startup.parameter_table(TRAINABLE, FROZEN, optax.adam(1e-3).init(TRAINABLE))
    rows = [line.split("  ") for line in table.splitlines()]
    rows = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert rows[0] == ["trainable", "frozen", "optimizer"]
    assert [row[0] for row in rows[1:]] == ["decoder", "other", "projector", "vision", "total"]
    assert rows[4] == ["vision", "0 (0 B)", "1,000 (3.91 KiB)", "0 (0 B)"]
    assert rows[5] == ["total", "19 (76 B)", "1,016 (3.94 KiB)", "39 (156 B)"]
    assert len({len(line) for line in table.splitlines()}) == 1  # aligned


def test_the_report_has_memory_and_devices(monkeypatch):
    monkeypatch.setattr(startup, "accelerator_hint", lambda: "a hint")
    compiled = jax.jit(lambda x: x * 2, donate_argnums=0).lower(jnp.ones(1024)).compile()
    report = startup.startup_report(TRAINABLE, FROZEN, (), compiled).splitlines()
    assert report[-3].startswith("training step, per device: ")
    assert "arguments 4.00 KiB + outputs 4.00 KiB - reused 4.00 KiB + temporary" in report[-3]
    assert report[-2] == f"devices: {jax.device_count()} x cpu, 1 process"
    assert report[-1] == "a hint"
    assert "training step" not in startup.startup_report(TRAINABLE, FROZEN, ())


@pytest.mark.parametrize(
    ("gpu", "tpu", "platforms", "expected"),
    [
        (False, False, "", None),
        (True, False, "", 'a GPU is present but JAX runs on the CPU: stop and run pip install -e ".[cuda]" to use it'),
        (False, True, "", 'a TPU is present but JAX runs on the CPU: stop and run pip install -e ".[tpu]" to use it'),
        (
            True,
            False,
            "cpu",
            'a GPU is present but JAX runs on the CPU because JAX_PLATFORMS="cpu": unset it to use the GPU',
        ),
    ],
)
def test_accelerator_hint(monkeypatch, gpu, tpu, platforms, expected):
    monkeypatch.setattr(startup, "gpu_present", lambda: gpu)
    monkeypatch.setattr(startup, "tpu_present", lambda: tpu)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert startup.accelerator_hint() == expected
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert startup.accelerator_hint() is None


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="a GPU's device file is present")
@pytest.mark.parametrize(("script", "present"), [("echo 'GPU 0: H200'", True), ("exit 9", False), (None, False)])
def test_gpus_are_found_by_nvidia_smi(tmp_path, monkeypatch, script, present):
    if script is not None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert startup.gpu_present() is present


@pytest.mark.skipif(Path("/dev/accel0").exists(), reason="a TPU's device file is present")
def test_tpus_are_found_by_environment_variables(monkeypatch):
    for name in ("TPU_NAME", "TPU_ACCELERATOR_TYPE"):
        monkeypatch.delenv(name, raising=False)
    assert not startup.tpu_present()
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    assert startup.tpu_present()
