"""Estimates of a program that the TPU's compiler has compiled: loops, classes, sources, bytes; see tests/golden/tpu."""

import re
from pathlib import Path

import pytest

from train_jax.core.errors import UserError
from train_jax.plan import cost, flops, hlo, report, tpu

GOLDEN = Path(__file__).parents[2] / "golden/tpu"
TEXT = (GOLDEN / "step.hlo").read_text(encoding="utf-8")
KERNEL = (GOLDEN / "kernel.hlo").read_text(encoding="utf-8")
CLASSES = (("layer", r"program\.py:layer"), ("loss", r"program\.py:loss"))
LAYERS, ROWS, WIDTH = 6, 512 // 4, 512
V5E = tpu.CHIPS["TPU v5 lite"]


def test_loops_count_with_the_constant_of_their_condition():
    module = hlo.parse(TEXT)
    assert "known_trip_count" not in TEXT
    assert flops.product_flops(module) == LAYERS * 3 * 2 * ROWS * WIDTH * WIDTH  # forward, and two backward
    assert hlo.collective_bytes(module) == {"all-reduce": LAYERS * WIDTH * WIDTH * 2}


@pytest.mark.parametrize(
    ("condition", "times"),
    [
        ("%n = s32[] constant(7)\n  ROOT %lt = pred[] compare(%i, %n), direction=LT", 7),
        ("%n = s32[] constant(7)\n  ROOT %lt = pred[] fusion(%i, %n), calls=%less", 7),
        (
            "%n = s32[] constant(7)\n  %lt = pred[] compare(%i, %n), direction=LT\n"
            "  ROOT %and = pred[] and(%lt, %running)",
            7,  # it may end early
        ),
        ("%n = s32[] constant(7)\n  ROOT %and = pred[] and(%waiting, %running)", 1),
        ("%n = s32[] constant(7)\n  ROOT %ne = pred[] compare(%i, %n), direction=NE", 1),
    ],
)
def test_a_loop_without_a_trip_count(condition, times):
    text = f"""
%less (a: s32[], b: s32[]) -> pred[] {{
  ROOT %lt = pred[] compare(%a, %b), direction=LT
}}

%condition (p: (s32[], f32[4])) -> pred[] {{
  {condition}
}}

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {{
  %r = f32[4]{{0}} all-reduce(%a), to_apply=%add
}}

ENTRY %main (p: f32[4]) -> f32[4] {{
  %w = (s32[], f32[4]) while(%t), condition=%condition, body=%body
}}
"""
    assert hlo.collective_bytes(hlo.parse(text)) == {"all-reduce": times * 16}


def test_cost_by_class():
    result = cost.program_cost(TEXT, V5E, CLASSES)
    layer = result.classes["layer"]
    assert layer.flops == flops.product_flops(hlo.parse(TEXT))
    # Kernels are read from HBM forward and backward; activations and gradients stay on the chip.
    assert layer.bytes == 2 * LAYERS * WIDTH * WIDTH * 2
    assert result.bound(layer) == max(layer.flops / V5E.flops, layer.bytes / V5E.bandwidth) <= result.seconds
    assert result.seconds == sum(one.cycles for one in result.classes.values()) / 1.5e9
    assert result.received == LAYERS * WIDTH * WIDTH * 2
    assert result.collective_seconds == result.received / V5E.link_bandwidth
    assert list(result.classes)[0] == "layer" and "loss" in result.classes and cost.OTHER in result.classes
    assert result.pallas.cycles == 0 and result.unestimated == {}


def test_cycles_are_those_that_the_compiler_notes():
    """Added up by hand from the text: each loop runs six times, all else once."""
    module, once = hlo.parse(TEXT), {}
    for name, body in module.computations.items():
        once[name] = sum(int(n) for one in body for n in re.findall(r'"estimated_cycles":"(\d+)"', one.rest))
    loops = [one for one in module.computations[module.entry] if one.opcode == "while"]
    bodies = [name for loop in loops for name in re.findall(r"body=%([\w.\-]+)", loop.rest)]
    expected = once[module.entry] + LAYERS * sum(once[name] for name in bodies)
    assert sum(operation.cycles for operation in cost.operations(TEXT)) == expected


def test_the_innermost_source_line_is_named():
    lines = (GOLDEN / "program.py").read_text(encoding="utf-8").splitlines()
    place, kind, _ = cost.program_cost(TEXT, V5E, ()).sources[0]
    number = int(place.partition(":")[2].partition(" ")[0])
    assert kind == "dot_general" and place.endswith(" layer") and "x @ kernel" in lines[number - 1]


def test_a_core_has_its_share_of_a_chip():
    core = tpu.CHIPS["TPU v4"].core(2)
    assert (core.memory, core.flops, core.clock) == (16e9, 137.5e12, 1.05e9)


def test_the_table_of_times():
    text = report.time_table("training step", cost.program_cost(TEXT, V5E, CLASSES))
    assert text.startswith(
        "training step on v5e: 0.129 ms by the compiler's estimate, without collectives; products at 4.7%"
    )
    assert "layer" in text and "collectives" in text


# Pallas kernels.

CALLS, OUTPUTS, INNER, ROWS_OF_KERNEL = 3, 16_384 * 4096, 512, 16_384  # as in kernel.py


def test_a_kernel_counts_with_its_grid_and_loops():
    """Each of 64 x 16 steps adds two products and takes a tanh; the weights are in memory on the chip."""
    result = cost.program_cost(KERNEL, V5E, ())
    assert result.pallas.flops == CALLS * 2 * OUTPUTS * INNER
    assert result.pallas.bytes == CALLS * (ROWS_OF_KERNEL * INNER * 2 + OUTPUTS * 4)
    assert "S(1)" in re.search(r"%dynamic-slice_bitcast_fusion[.\d]* = (\S+)", KERNEL)[1]
    assert result.seconds == result.compiler_seconds + result.pallas.cycles / V5E.clock
    assert result.utilisation == result.pallas.flops / V5E.flops / result.seconds


def test_a_block_moves_when_its_index_changes():
    """Of the inner axis of the grid the rows' blocks do not depend; the weights' do, and come again for every row."""
    result = cost.program_cost(KERNEL.replace("S(1)", ""), V5E, ())
    weights = INNER * 4096 * 2
    assert result.pallas.bytes == CALLS * (ROWS_OF_KERNEL * INNER * 2 + OUTPUTS * 4 + ROWS_OF_KERNEL // 256 * weights)


@pytest.mark.parametrize("slow", ["flops", "bandwidth", "vector"])
def test_a_kernel_takes_as_long_as_what_bounds_it(monkeypatch, slow):
    chip = V5E._replace(flops=1e30, bandwidth=1e30)
    monkeypatch.setattr(cost, "VECTOR_LANES", 4096 if slow == "vector" else 1e30)
    if slow != "vector":
        chip = chip._replace(**{slow: 1e12})
    pallas = cost.program_cost(KERNEL, chip, ()).pallas
    expected = {
        "flops": pallas.flops / 1e12 * chip.clock,
        "bandwidth": pallas.bytes / 1e12 * chip.clock,
        "vector": CALLS * 3 * OUTPUTS / 4096,
    }
    assert pallas.cycles == round(expected[slow])


def test_the_table_says_what_kernels_take():
    text = report.time_table("forward", cost.program_cost(KERNEL, V5E, ()))
    assert re.match(
        r"forward on v5e: \S+ ms by the compiler's estimate and our count of Pallas kernels \(\S+ ms without", text
    )
    assert re.search(r"^Pallas +1.05 ms", text, re.M)


def test_a_kernel_that_cannot_be_read_is_named(monkeypatch):
    monkeypatch.setattr(cost.pallas, "_module_cost", lambda *_: None)
    result = cost.program_cost(KERNEL, V5E, ())
    assert list(result.unestimated.values()) == [CALLS] and result.pallas.cycles == 0
    assert "could not be read: layer" in report.time_table("forward", result)


def test_fits_is_of_the_chip_that_was_compiled_for():
    program = report.Program("step", 10**9, 10**9, 0, 0, 1.0, {}, cost.program_cost(TEXT, V5E, CLASSES))
    plan = report.RunPlan("TPU v5 lite", {"data": 4}, 0, 0, 0, 0, [program])
    assert report.cards_table(plan).splitlines()[1:] == ["TPU v5e   16 GB  yes, 13.0 GiB left"]


def test_without_libtpu_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^--tpu=v5e:2x2 needs libtpu, .*: pip install 'paligemma-jax\[tpu\]'$"):
        tpu.open_slice("v5e:2x2")
