"""No result is of old weights: weights change between calls of every public function that takes a callable.

A function that is added must be listed here, with a case or with the reason why it needs none.
"""

import collections.abc
import dataclasses
import functools
import gc
import importlib
import inspect
import math
import pkgutil
import typing
import weakref
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flow_jax as fj
from flow_jax.ode.likelihood import start_log_prob

X = jnp.array([[0.5, -1.0], [2.0, 0.25]])
T = jnp.array([0.25, 0.75])
KEY = jax.random.key(0)
IMAGES = jnp.zeros((2, 1, 2, 1), jnp.uint8)
EULER = dict(solver="euler", num_steps=2)


@pytest.fixture(scope="module", autouse=True)
def _fast(fast_compilation):
    """Much compiling, little computing."""


class Net(nnx.Module):
    """(t, x, ...) -> w (1 + t) + x: depends on its weight everywhere."""

    traces = 0

    def __init__(self, value: float = 1.0):
        self.w = nnx.Param(jnp.float32(value))

    def velocity(self, t, x, *args):
        Net.traces += 1
        return self.w[...] * (1 + fj.arrays.per_row(jnp.asarray(t), x)) + x

    __call__ = velocity

    def scaled(self, scale, t, x, *args):
        return self.velocity(t, x) * scale

    def of_one(self, t, x):
        return self.velocity(t, x[None])[0]


# Functions.


def _swap(x_0, x_1):
    return jnp.arange(2), jnp.array([1, 0])


def _coupling(v):
    """Pairs that depend on the weights."""

    def coupling(x_0, x_1):
        order = np.argsort(np.asarray(v(0.0, -x_1 * 0) * jnp.array([[1.0], [-1.0]]))[:, 0])
        return np.arange(2), order

    return coupling


PATH = fj.paths.CondOT()
SAMPLE = PATH.sample(X, X[::-1], T)
CASES = {
    "paths.conversions:change_schedule": lambda v: fj.sample(
        fj.conversions.change_schedule(v, PATH, fj.paths.Cosine()), X, **EULER
    ).x,
    "couplings.pairings:over_buffer": lambda v: np.stack(
        [j for _, j in fj.couplings.over_buffer(X, X, 1, 0, _coupling(v))]
    ),
    "few_step:mean_flow": lambda v: fj.few_step.mean_flow(v, SAMPLE, jnp.ones(2)),
    "few_step:sample_mean_flow": lambda v: fj.few_step.sample_mean_flow(v, X, 2),
    "few_step:reflow_pairs": lambda v: fj.few_step.reflow_pairs(v, X, **EULER).x_1,
    "ode.guidance:Guided.__init__": lambda v: fj.sample(
        fj.guidance.Guided(v, 2.0, 3), X, **EULER, args=(jnp.arange(2),)
    ).x,
    "ode.likelihood:exact_divergence": lambda v: fj.likelihood.exact_divergence(lambda x: v(0.5, x), X)[0],
    "ode.likelihood:hutchinson_divergence": lambda v: fj.likelihood.hutchinson_divergence(
        lambda x: v(0.5, x), X, X[None]
    )[0],
    "ode.likelihood:log_prob": lambda v: fj.log_prob(v, X, **EULER).log_prob,
    "ode.likelihood:log_prob, its prior": lambda v: fj.log_prob(
        Net(), X, **EULER, prior=lambda x: v(0.0, x)[:, 0]
    ).log_prob,
    "ode.likelihood:image_bits_per_dim": lambda v: fj.image_bits_per_dim(v, IMAGES, KEY, **EULER),
    "ode.likelihood:start_log_prob": lambda v: start_log_prob(lambda x: jnp.exp(v(0.0, x[:1] * 0)) * x)(X),
    "losses:flow_matching": lambda v: fj.losses.flow_matching(v, lambda t, x: x, T, X),
    "losses:flow_matching, its marginal": lambda v: fj.losses.flow_matching(lambda t, x: x, v, T, X),
    "losses:conditional_flow_matching": lambda v: fj.losses.conditional_flow_matching(v, SAMPLE),
    "losses:coupled_flow_matching": lambda v: fj.losses.coupled_flow_matching(v, PATH, X, X, T, _swap),
    "losses:coupled_flow_matching, its coupling": lambda v: fj.losses.coupled_flow_matching(
        lambda t, x: x, PATH, X, X, T, _coupling(v)
    ),
    "metrics.distances:path_energy": lambda v: fj.metrics.path_energy(v, X, 2),
    "metrics.distances:straightness": lambda v: fj.metrics.straightness(v, X, 2),
    "paths.gaussian:GaussianPath.__init__": lambda v: fj.paths.GaussianPath(
        lambda t, x_1: v(t, x_1[None])[0], lambda t, x_1: 1 - t
    ).sample(X, X, T).x_t,
    "ode.sampling:sample": lambda v: fj.sample(v, X, **EULER).x,
    "ode.sampling:sample, adaptive": lambda v: fj.sample(v, X, "tsit5", rtol=1e-3, atol=1e-3).x,
    "ode.sampling:sample, rows on their own": lambda v: fj.sample(
        v, X, "tsit5", rtol=1e-3, atol=1e-3, per_sample=True
    ).x,
    "ode.sde:sample_sde": lambda v: fj.sample_sde(v, X, PATH, KEY, 2).x,
}  # fmt: skip
WITHOUT = {
    "arrays:velocity_at": "calls it",
    "callables:call_now": "is what those that are not compiled go through",
    "callables:run": "is what all of these go through",
    "metrics.frechet:FrechetScore.__init__": "calls it, on the host",
    "data.image_datasets:ImageData.__init__": "calls it, on the host",
    "ode.integrate:integrate": "is what sample and log_prob call",
    "couplings.large:fit_semidiscrete": "compiles what it is given at each call",
    "tasks.plane_figures:draw_density": "calls it, on the host",
    "tasks.plane_figures:draw_field": "calls it, on the host",
    "data.row_draws:draw_rows": "calls it, on the host",
    "tasks.image_evaluation:ImageEvaluation.moments": "calls it, on the host",
    "tasks.image_evaluation:ImageEvaluation.score": "calls it, on the host",
}


def takes_callable(annotation) -> bool:
    if collections.abc.Callable in (annotation, typing.get_origin(annotation)):
        return True
    return any(takes_callable(part) for part in typing.get_args(annotation) if not isinstance(part, list))


def public_functions(package):
    """Functions and methods of all modules by "module:name", with their signatures."""
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) != info.name:
                continue
            inside = vars(value) if inspect.isclass(value) else {}
            members = {f"{name}.{key}": f for key, f in inside.items() if key == "__init__" or not key.startswith("_")}
            for full, function in (members or {name: value}).items():
                if inspect.isfunction(function):
                    yield f"{info.name.partition('.')[2]}:{full}", inspect.signature(function)


def test_every_public_function_that_takes_a_callable_is_listed():
    names = {
        name
        for name, signature in public_functions(fj)
        if any(takes_callable(parameter.annotation) for parameter in signature.parameters.values())
    }
    assert names == {name.partition(",")[0] for name in CASES} | set(WITHOUT)


# Callables.


@dataclasses.dataclass(frozen=True)
class Frozen:
    net: Any

    def velocity(self, t, x, *args):
        return self.net(t, x)


class Holder:
    """Mutable, equal to itself alone."""

    def __init__(self, net):
        self.net = net

    def __call__(self, t, x, *args):
        return self.net(t, x)


class Inner(nnx.Module):
    """A module with a callable that is no state."""

    def __init__(self, velocity):
        self.velocity = velocity

    def __call__(self, t, x, *args):
        return self.velocity(t, x)


NET = Net()


def over_a_global(t, x, *args):
    return jax.vmap(lambda row: NET.of_one(0.5, row))(x) + 0 * t


def of_net(net, t, x, *args):
    return net(t, x)


KEPT = {
    "the module": lambda net: net,
    "a method": lambda net: net.velocity,
    "its call": lambda net: net.__call__,
    "a partial": lambda net: functools.partial(net.velocity),
    "a partial with a number": lambda net: functools.partial(net.scaled, 2.0),
    "a partial with arrays": lambda net: functools.partial(net.scaled, np.array([[1.0, 2.0]], np.float32)),
    "a partial of a partial": lambda net: functools.partial(functools.partial(net.scaled, 2.0)),
    "a partial over the module": lambda net: functools.partial(of_net, net),
    "jax's partial": lambda net: jax.tree_util.Partial(net.velocity),
    "jax's partial of a function": lambda net: jax.tree_util.Partial(of_net, net),
    "a method of a frozen dataclass": lambda net: Frozen(net).velocity,
    "a dataclass of a method": lambda net: Frozen(net.velocity).velocity,
    "a module in a module": lambda net: Inner(net),
    "a method in a module": lambda net: Inner(net.velocity),
    "a partial in a module": lambda net: Inner(functools.partial(net.scaled, 2.0)),
}
ANEW = {
    "a closure": lambda net: lambda t, x, *args: net(t, x),
    "an object": Holder,
    "a method of an object": lambda net: Holder(net).__call__,
    "a partial of a closure": lambda net: functools.partial(lambda t, x, *args: net(t, x)),
    "jax's partial of a closure": lambda net: jax.tree_util.Partial(lambda t, x, *args: net(t, x)),
    "a closure in a module": lambda net: Inner(lambda t, x: net(t, x)),
    "a vmap of a method": lambda net: jax.vmap(net.of_one, (None, 0)),
    "a dataclass of a closure": lambda net: Frozen(lambda t, x: net(t, x)).velocity,
}


@pytest.mark.parametrize("kind", ["a method", "a closure", "an object"])
@pytest.mark.parametrize("name", CASES)
def test_modules_use_current_weights(name, kind):
    case, net = CASES[name], Net(1.0)
    callable_ = (KEPT | ANEW)[kind](net)
    results = []
    for value in (1.0, -2.0):
        net.w[...] = jnp.float32(value)
        results.append(case(callable_))
        np.testing.assert_allclose(results[-1], case(Net(value)), rtol=2e-5, atol=1e-6)
    assert not np.allclose(*results)


@pytest.mark.parametrize("kind", KEPT | ANEW)
def test_any_callable_uses_current_weights(kind):
    net = Net()
    held = (KEPT | ANEW)[kind](net)
    for value in (1.0, 2.0, -3.0):
        net.w[...] = jnp.float32(value)
        np.testing.assert_allclose(fj.sample(held, X, "euler", 1).x, X + held(0.0, X), rtol=1e-6)


def test_a_function_of_a_global_module_uses_its_current_weights_and_its_replacement():
    global NET
    for value in (1.0, 2.0):
        NET.w[...] = jnp.float32(value)
        np.testing.assert_allclose(fj.sample(over_a_global, X, "euler", 1).x, 2 * X + 1.5 * value, rtol=1e-6)
    NET = Net(5.0)
    np.testing.assert_allclose(fj.sample(over_a_global, X, "euler", 1).x, 2 * X + 7.5, rtol=1e-6)


@pytest.mark.parametrize("kind", KEPT)
def test_new_weights_are_not_traced_again(kind):
    fj.sample(KEPT[kind](Net(1.0)), X, "euler", 3)
    traced = Net.traces
    for value in (2.0, 3.0):
        fj.sample(KEPT[kind](Net(value)), X, "euler", 3)
    assert Net.traces == traced


COMPILED = (
    "paths.conversions:change_schedule",
    "few_step:sample_mean_flow",
    "few_step:reflow_pairs",
    "ode.guidance:Guided.__init__",
    "ode.likelihood:log_prob",
    "ode.likelihood:image_bits_per_dim",
    "metrics.distances:path_energy",
    "metrics.distances:straightness",
    "ode.sampling:sample",
    "ode.sampling:sample, adaptive",
    "ode.sampling:sample, rows on their own",
    "ode.sde:sample_sde",
)


@pytest.mark.parametrize("name", COMPILED)
def test_bound_methods_are_not_traced_again(name):
    CASES[name](Net(1.0).velocity)
    traced = Net.traces
    CASES[name](Net(2.0).velocity)
    assert Net.traces == traced


# What else a module holds.


class Settings:
    def __init__(self):
        self.scale = 1.0


class Layers(nnx.Module):
    def __init__(self):
        self.norm = nnx.BatchNorm(2, use_running_average=True, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=nnx.Rngs(0))
        self.table = nnx.data([jnp.float32(1.0)])
        self.activation = jnp.tanh
        self.scale, self.settings, self.factors = 1.0, Settings(), (1, 2)

    def velocity(self, t, x):
        scale = self.scale * self.settings.scale * self.factors[1] * self.table[0]
        return self.dropout(self.activation(self.norm(x))) * scale


def _set_mean(net):
    net.norm.mean[...] = jnp.float32(3.0)


def _set(name, value):
    return lambda net: setattr(net, name, value)


@pytest.mark.parametrize(
    "change",
    [
        _set_mean,
        lambda net: net.norm.set_attributes(use_running_average=False),
        lambda net: net.dropout.set_attributes(deterministic=False),
        lambda net: net.table.__setitem__(0, jnp.float32(7.0)),
        lambda net: setattr(net.settings, "scale", 5.0),
        _set("scale", -1.0),
        _set("scale", True),
        _set("factors", (1, 9)),
        _set("activation", jax.nn.relu),
        _set("activation", lambda x: x),
    ],
)
def test_changes_of_attributes_take_effect(change):
    net = Layers()
    for held in (net.velocity, functools.partial(net.velocity)):
        fj.sample(held, X, "euler", 1)
    change(net)
    want = X + nnx.merge(*nnx.split(net), copy=True).velocity(0.0, X)  # a copy: a call may change statistics and counts
    for held in (net.velocity, functools.partial(net.velocity)):
        np.testing.assert_allclose(fj.sample(held, X, "euler", 1).x, want, rtol=1e-5)


def test_a_dataclass_uses_its_current_arrays():
    means = np.zeros((1, 2), np.float32)
    exact = fj.marginals.MixtureMarginal(PATH, means, 1.0)
    for value in (0.0, 4.0):
        means[:] = value
        np.testing.assert_allclose(fj.sample(exact.velocity, X, "euler", 1).x, X + exact.velocity(0.0, X), rtol=1e-5)


def test_a_user_defined_path_uses_its_current_attributes():
    class Mine(fj.paths.CondOT):
        power = 1.0

        def sigma(self, t):
            return (1 - t) ** self.power

    def end(path):
        return fj.sample_sde(Net(), X, path, KEY, 2).x

    first = end(Mine())
    path = Mine()
    object.__setattr__(path, "power", 2.0)
    assert not np.allclose(end(path), first)


SCALE = 1.0


def scaled(t, x):
    return SCALE * jnp.ones_like(x)


def test_a_function_is_traced_again_if_a_global_that_it_reads_changes(monkeypatch):
    for value in (1.0, 1.0, 2.5):
        monkeypatch.setitem(globals(), "SCALE", value)
        np.testing.assert_allclose(fj.sample(scaled, X, "euler", 1).x, X + value)


def test_callables_that_are_traced_at_each_call_are_released():
    net = Net()
    fj.sample(ANEW["a closure"](net), X, "euler", 1)
    held = weakref.ref(net)
    net = None
    gc.collect()
    assert held() is None


# What code reads, and what keeps what it traced.


class Config:
    scale = 1.0


class Meta(type):
    @property
    def scale(cls):
        return NET.w[...]


class WithMeta(metaclass=Meta):
    pass


class Base(nnx.Module):
    def scale(self):
        return NET.w[...]


class Derived(Base):
    def __call__(self, t, x, *args):
        return self.scale() * (1 + per_row(t, x)) + x


class ByProperty(nnx.Module):
    @property
    def scale(self):
        return SCALE

    def __call__(self, t, x, *args):
        return self.scale * (1 + per_row(t, x)) + x


class ByClass(nnx.Module):
    scale = 1.0

    def __call__(self, t, x, *args):
        return type(self).scale * (1 + per_row(t, x)) + x


class ByHelper(nnx.Module):
    @staticmethod
    def scale():
        return Config.scale

    @classmethod
    def velocity(cls, t, x, *args):
        return cls.scale() * (1 + per_row(t, x)) + x

    def __call__(self, t, x, *args):
        return self.velocity(t, x)


@dataclasses.dataclass(frozen=True)
class FrozenOverNet:
    factor: float = 1.0

    def __call__(self, t, x, *args):
        return over_net(t, x)


def per_row(t, x):
    return fj.arrays.per_row(jnp.asarray(t), x)


def over_net(t, x, *args):
    return NET.velocity(t, x)


def over_config(t, x, *args):
    return Config.scale * (1 + per_row(t, x)) + x


def over_attribute(t, x, *args):
    return over_attribute.scale * (1 + per_row(t, x)) + x


def over_meta(t, x, *args):
    return WithMeta.scale * (1 + per_row(t, x)) + x


def in_scan(t, x, *args):
    return jax.lax.scan(scan_body, (jnp.asarray(t), x), None, length=1)[0][1]


def scan_body(carry, _):
    return (carry[0], NET.velocity(*carry)), None


def in_cond(t, x, *args):
    return jax.lax.cond(x.sum() > 0, over_net, over_net, jnp.asarray(t), x)


@functools.wraps(over_config)
def wrapped(*args):
    return over_net(*args)


JITTED = jax.jit(over_net)
READS = {
    "a function over a module": over_net,
    "over a class attribute": over_config,
    "over its own attribute": over_attribute,
    "over a metaclass's property": over_meta,
    "a wrapper": wrapped,
    "a method of a base class": Derived(),
    "a property": ByProperty(),
    "an attribute of its class": ByClass(),
    "static and class methods": ByHelper(),
    "a bound class method": ByHelper.velocity,
    "a frozen dataclass": FrozenOverNet(),
    "a method of a frozen dataclass": FrozenOverNet().__call__,
    "a field": Frozen(FrozenOverNet()).velocity,
    "a module in a module, partial": functools.partial(Inner(Derived())),
    "jit": JITTED,
    "jit of a module": jax.jit(lambda t, x, *args: NET(t, x)),
    "nnx.jit": nnx.jit(over_net),
    "jit of jit in a partial": functools.partial(jax.jit(jax.jit(over_net))),
    "jit in a module": Inner(jax.jit(over_net)),
    "checkpoint": jax.checkpoint(over_net),
    "nnx.remat": nnx.remat(over_net),
    "vmap of jit": lambda t, x, *args: jax.vmap(JITTED, (None, 0))(t, x[:, None])[:, 0],
    "a function over jit": lambda t, x, *args: JITTED(t, x),
    "cache": functools.cache(over_net),
    "singledispatch": functools.singledispatch(over_net),
    "scan": in_scan,
    "cond": in_cond,
}


def _set_all(value: float, monkeypatch) -> None:
    """What READS depend on."""
    monkeypatch.setitem(globals(), "SCALE", value)
    monkeypatch.setattr(Config, "scale", value)
    monkeypatch.setattr(ByClass, "scale", value)
    monkeypatch.setattr(over_attribute, "scale", value, raising=False)
    NET.w[...] = jnp.float32(value)


@pytest.mark.parametrize("kind", READS)
def test_values_that_code_reads_are_current(kind, monkeypatch):
    for value in (1.0, -2.0, 3.0):
        _set_all(value, monkeypatch)
        for name in ("ode.sampling:sample", "metrics.distances:path_energy"):
            np.testing.assert_allclose(CASES[name](READS[kind]), CASES[name](Net(value)), rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", ["jit", "a function over jit"])
@pytest.mark.parametrize("name", [name for name in CASES if "rows" not in name and "adaptive" not in name])
def test_no_earlier_trace_is_reused(name, kind, monkeypatch):
    for value in (1.0, -2.0):
        _set_all(value, monkeypatch)
        np.testing.assert_allclose(CASES[name](READS[kind]), CASES[name](Net(value)), rtol=2e-5, atol=1e-6)


class Table(nnx.Module):
    """A module like most: its methods read their arguments, libraries, numbers, and functions that do."""

    offset: ClassVar[tuple] = (0.0, 1.0)
    traces = 0

    def __init__(self, value: float):
        self.inner = Net(value)

    @property
    def factor(self):
        return SCALE * self.offset[1]

    @jax.jit
    def __call__(self, t, x, *args):
        Table.traces += 1
        return pure(self.inner(t, x), self.factor)


def pure(x, factor):
    return jax.vmap(functools.partial(jnp.multiply, factor))(x) + math.sqrt(4.0) * Config.scale


def test_a_module_that_reads_functions_and_numbers_is_compiled_once(monkeypatch):
    for value in (1.0, 2.0, 3.0):
        result = fj.sample(Table(value), X, "euler", 1).x
        np.testing.assert_allclose(result, 2 * X + value + 2.0, rtol=1e-6)
    assert Table.traces == 1
    monkeypatch.setattr(Config, "scale", 2.0)
    np.testing.assert_allclose(fj.sample(Table(1.0), X, "euler", 1).x, 2 * X + 5.0, rtol=1e-6)
    assert Table.traces == 2


@pytest.mark.parametrize("wrap", [jax.jit, nnx.jit, functools.cache])
def test_functions_inside_jit_and_cache_are_compiled_once(wrap):
    fj.sample(wrap(Net(1.0)), X, "euler", 4)
    traced = Net.traces
    np.testing.assert_allclose(fj.sample(wrap(Net(-4.0)), 0 * X, "euler", 4).x, -7.53125, rtol=1e-6)
    assert Net.traces == traced


def test_a_loss_does_not_trace_a_compiled_method_again():
    fj.losses.conditional_flow_matching(Table(1.0), SAMPLE)
    traced = Table.traces
    for value in (2.0, 3.0):
        net = Table(value)
        loss = fj.losses.conditional_flow_matching(net, SAMPLE)
        np.testing.assert_allclose(loss, ((net(SAMPLE.t, SAMPLE.x_t) - SAMPLE.dx_t) ** 2).mean(1), rtol=1e-5)
    assert Table.traces == traced


def test_code_from_exec_is_read_too():
    names = {"net": Net(1.0)}
    exec("def velocity(t, x):\n    return net(t, x)", names)
    for value in (1.0, 2.0):
        names["net"] = Net(value)
        np.testing.assert_allclose(fj.sample(names["velocity"], X, "euler", 1).x, 2 * X + value, rtol=1e-6)
