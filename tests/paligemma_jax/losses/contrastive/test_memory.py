"""Compiled steps of the contrastive losses: memory proportional to images x chunk, and communication."""

import re

import jax
import jax.numpy as jnp
import pytest

from paligemma_jax.losses import sigmoid_loss, softmax_loss
from tests.paligemma_jax.contrastive import abstract_batch, plain_sigmoid
from train_jax.plan import hlo
from train_jax.system.memory import step_memory

WIDTH, CHUNK = 32, 64


def sigmoid(*batch, **options):
    return sigmoid_loss(*batch, **options)


def softmax(zimg, ztxt, log_scale, bias, **options):
    return softmax_loss(zimg, ztxt, log_scale, **options) + 0 * bias


LOSSES = {"sigmoid": sigmoid, "softmax": softmax}


def compiled_step(loss, batch, devices):
    arguments, mesh = abstract_batch(batch, WIDTH, devices)
    step = jax.value_and_grad(lambda *a: LOSSES[loss](*a, mesh=mesh, chunk_size=CHUNK), (0, 1, 2, 3))
    return jax.jit(step).lower(*arguments).compile()


@pytest.mark.parametrize("loss", LOSSES)
def test_memory_grows_with_the_images_of_a_device_and_not_with_the_global_batch(loss):
    used = {batch: step_memory(compiled_step(loss, batch, 8)).temp for batch in (1024, 8192, 32768)}
    for batch, temp in used.items():
        local = batch // 8
        assert temp < 4 * local * (4 * CHUNK + 8 * WIDTH) + 2**14, f"{temp} bytes at {batch}"
    assert used[32768] < 4.4 * used[8192]  # b_local is 4 times as large; all pairs of a device would be 16 times
    assert used[32768] < 4 * 4096 * 32768 / 50  # all pairs of a device, once


@pytest.mark.parametrize("loss", LOSSES)
def test_memory_of_a_device_does_not_grow_with_their_number(loss):
    # From 4 on: of two devices the one hop is no loop, and needs a block of texts less.
    four, eight = (step_memory(compiled_step(loss, 256 * devices, devices)).temp for devices in (4, 8))
    assert abs(eight - four) < 2**12


def test_one_device_at_32k():
    """The plain loss would hold several matrices of 4 GiB; here it is the embeddings and chunks of 8 MiB."""
    arguments, _ = abstract_batch(32768, WIDTH, 1)
    plain = jax.eval_shape(lambda zimg, ztxt: zimg @ ztxt.T, *arguments[:2])
    assert step_memory(compiled_step("sigmoid", 32768, 1)).temp < plain.size * 4 / 50


def test_at_least_8_times_less_than_the_plain_loss():
    arguments, _ = abstract_batch(2048, WIDTH, 1)
    plain = jax.jit(jax.value_and_grad(plain_sigmoid, (0, 1, 2, 3))).lower(*arguments).compile()
    assert 8 * step_memory(compiled_step("sigmoid", 2048, 1)).temp < step_memory(plain).temp


@pytest.mark.parametrize("loss", LOSSES)
def test_texts_travel_from_neighbour_to_neighbour_and_are_never_gathered(loss):
    devices, local = 8, 128
    moved = hlo.collective_bytes(hlo.parse(compiled_step(loss, local * devices, devices).as_text()))
    assert set(moved) == {"collective-permute", "all-reduce"}
    assert moved["all-reduce"] <= 16  # the loss and the gradients of scale and bias
    vectors = 4 * local * WIDTH
    sides = 2 if loss == "sigmoid" else 3  # texts and their gradients; softmax: texts in its first round as well
    statistics = 0 if loss == "sigmoid" else 2 * 3 * 4 * local  # in both rounds, three numbers of each text
    whole = devices * (sides * vectors + statistics)
    # The results of the last transfer are not used, so the compiler may remove it.
    assert (devices - 1) / devices * whole <= moved["collective-permute"] <= whole


def test_transfers_do_not_wait_for_the_hop():
    """The loop over hops sends what it received, so that communication can overlap with computation."""
    module = hlo.parse(compiled_step("sigmoid", 1024, 8).as_text())
    sent = 0
    for instructions in module.computations.values():
        made = {instruction.name: instruction for instruction in instructions}
        for instruction in instructions:
            if instruction.opcode in ("collective-permute", "collective-permute-start") and is_body(instructions):
                sent += 1
                source = made[operand(instruction)]
                while source.opcode in ("copy", "bitcast", "get-tuple-element"):
                    source = made[operand(source)]
                assert source.opcode == "parameter", source
    assert sent == 2  # texts, and the gradients of those before


def is_body(instructions):
    """Whether a computation takes one tuple, as the body of a loop does."""
    parameters = [instruction for instruction in instructions if instruction.opcode == "parameter"]
    return len(parameters) == 1 and parameters[0].type.startswith("(")


def operand(instruction):
    """Name of the first operand."""
    return re.search(r"%?([\w.\-]+)[,)]", instruction.rest)[1]


def test_half_precision_embeddings_are_sent_in_half_precision():
    arguments, mesh = abstract_batch(1024, WIDTH, 8, jnp.bfloat16)
    loss = jax.jit(lambda *a: sigmoid_loss(*a, mesh=mesh, chunk_size=CHUNK)).lower(*arguments)
    text = loss.as_text()
    assert "collective_permute" in text
    assert all("xbf16>" in line for line in text.splitlines() if "collective_permute" in line)
