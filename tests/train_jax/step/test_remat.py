"""The choice of model.remat=auto: the first step of the ladder that fits, compiled once; nothing else changes."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from train_jax.core.errors import UserError
from train_jax.parallel import sharding
from train_jax.step import placement, remat

GB = 10**9
OUT = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm")


@dataclasses.dataclass(frozen=True)
class Config:
    remat: str
    width: int = 3


class Tower(nnx.Module):
    def __init__(self, config):
        self.config = config
        self.kernel = nnx.Param(jnp.zeros((config.width, config.width)))


class Towers(nnx.Module):
    """Two towers; what a whole model calls its config need not have the field."""

    def __init__(self, *remats: str):
        self.config = "towers"
        self.towers = nnx.List([Tower(Config(each)) for each in remats])


def place(*remats):
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
    return placement.place(Towers(*remats), ".*", ((".*", ()),), mesh)


def configs(placed):
    return [module.config for _, module in nnx.iter_modules(placed.model()) if isinstance(module, Tower)]


def remats(placed):
    return [config.remat for config in configs(placed)]


class Step(NamedTuple):
    remats: list[str]
    needed: int


def choose(free, sizes, *towers):
    """The chosen step, the sentence, and what was compiled; a size may be an error of the compiler."""
    compiled = []

    def compile(model):
        compiled.append(remats(model))
        size = sizes.get(remats(model)[0], 0)
        if isinstance(size, Exception):
            raise size
        return Step(remats(model), size)

    step, sentence = remat.compile_step(place(*towers), compile, lambda step: step.needed, lambda: free)
    return step.remats, sentence, [each[0] for each in compiled]


SIZES = {"mlp": 9 * GB, "block": 2 * GB}


@pytest.mark.parametrize(
    ("free", "chosen", "compiled"),
    [(10 * GB, "mlp", 1), (9.9 * GB, "block", 2), (GB, "block", 2), (-GB, "block", 2)],
)
def test_the_first_step_that_leaves_a_tenth_of_the_free_memory_is_chosen(free, chosen, compiled):
    step, sentence, tried = choose(int(free), SIZES, "auto", "auto")
    assert step == [chosen, chosen] and tried == list(remat.LADDER[:compiled])
    assert f"model.remat=auto chooses {chosen}: with " in str(sentence)


def test_the_sentence_has_the_memory():
    assert choose(16 * GB, SIZES, "auto")[1] == (
        "model.remat=auto chooses mlp: with mlp the step needs 8.38 GiB of 14.9 GiB free"
    )
    assert choose(8 * GB, SIZES, "auto")[1] == (
        "model.remat=auto chooses block: with mlp the step needs 8.38 GiB of 7.45 GiB free"
    )


def wrapped(error):
    """An error of the plan command, which says more than the compiler's."""
    wrapping = UserError("the training step does not fit")
    wrapping.__cause__ = error
    return wrapping


@pytest.mark.parametrize("error", [OUT, wrapped(OUT)])
def test_a_step_that_the_compiler_cannot_fit_is_passed_over(error):
    step, sentence, tried = choose(10 * GB, {"mlp": error}, "auto")
    assert step == ["block"] and tried == ["mlp", "block"]
    assert sentence == "model.remat=auto chooses block: with mlp the step runs out of memory"


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError("INTERNAL: something else"), UserError("bad config")])
def test_other_errors_are_raised(error):
    with pytest.raises(type(error)) as raised:
        choose(10 * GB, {"mlp": error}, "auto")
    assert raised.value is error


def test_without_reported_memory_blocks_are_recomputed():
    step, sentence, tried = choose(None, SIZES, "auto")
    assert step == tried == ["block"]
    assert sentence == "model.remat=auto chooses block: devices report no memory"


def test_only_auto_is_a_choice():
    assert choose(10 * GB, SIZES, "dots", "auto")[0] == ["dots", "mlp"]
    assert choose(GB, {"block": 2 * GB}, "block", "none") == (["block", "none"], None, ["block"])


def test_a_choice_changes_nothing_but_the_field():
    placed = place("auto")
    changed = remat.with_remat(placed, "mlp")
    assert remats(placed) == ["auto"] and configs(changed) == [Config("mlp")]
    assert changed.trainable is placed.trainable and changed.shardings is placed.shardings
    assert remat.with_remat(changed, "none").graph == changed.graph
