"""Learning-rate schedules and optax chains from a config, for flat parameters `{"decoder/layers/.../kernel": array}`.

The stages of a chain have a fixed order: cast gradients to float32, clip their global norm, compute the optimizer's
direction, add decoupled weight decay, and multiply by the negative learning rate, which may depend on the path:

    update = -rate(path, step) * (direction + weight_decay * parameter)

The decay is multiplied by the learning rate, as in torch's and optax's AdamW (decoupled from the gradient statistics as
in Loshchilov and Hutter, 2019, arXiv 1711.05101). big_vision adds the decay after the rate, and its default mask
matches no kernel of Gemma; the default mask here matches all kernels.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from train_jax.core.config_keys import WHOLE_MAX
from train_jax.core.errors import UserError
from train_jax.core.patterns import compile_regex, cover, select
from train_jax.optim.adamw_8bit import scale_by_adam_8bit

# Names of weight matrices, those of adapters included; not biases, norm scales, logit scales or position embeddings.
DEFAULT_WEIGHT_DECAY_MASK = r"(.*/)?(\w*kernel|embedding|lora_a|lora_b|difference)"

Step = int | Array  # number of updates made so far
Rate = tuple[float, int | None]  # factor, and warm-up in steps (None: the schedule's)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """An optax schedule: a warm-up (linear from 0, or constant), then decay from `peak`.

    Attributes:
      peak: learning rate at the end of the warm-up.
      decay: factor of the peak as a function of the updates made since the warm-up ended (0 or more).
      warmup_steps: length of the warm-up in updates; 0 starts at the peak.
      constant: learning rate during the warm-up; None warms up linearly.
    """

    peak: float
    decay: Callable[[Float[Array, ""]], Float[Array, ""]]
    warmup_steps: int
    constant: float | None = None

    def __call__(self, step: Step, warmup_steps: int | None = None) -> Float[Array, ""]:
        """Returns the learning rate after `step` updates; `warmup_steps` replaces the warm-up but not the decay."""
        step = jnp.asarray(step, jnp.float32)
        warmup_steps = self.warmup_steps if warmup_steps is None else warmup_steps
        ramp = jnp.minimum(step / max(warmup_steps, 1), 1.0) if warmup_steps and self.constant is None else 1.0
        rate = self.peak * ramp * self.decay(jnp.maximum(step - self.warmup_steps, 0.0))
        return rate if self.constant is None else jnp.where(step < warmup_steps, self.constant, rate)


# Decay functions by name: factor of the peak at t, the updates made since the warm-up ended (float32).
SCHEDULES: dict[str, Callable] = {
    "constant": lambda t, span, end, timescale: jnp.ones_like(t),
    "linear": lambda t, span, end, timescale: 1.0 + (end - 1.0) * jnp.minimum(t / span, 1.0),
    "cosine": lambda t, span, end, timescale: (
        end + (1.0 - end) * 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.minimum(t / span, 1.0)))
    ),
    "rsqrt": lambda t, span, end, timescale: jax.lax.rsqrt(1.0 + t / timescale),
}


def check(config: ConfigDict, paths: Iterable[str] | None = None) -> None:
    """Checks what its keys' ranges (config/run_keys.py) leave open, before data or parameters exist.

    Args:
      config: of the optimizer, see these functions.
      paths: of the trainable parameters, if known, to check that every pattern matches one.

    Raises:
      UserError: the config is invalid.
    """
    _check_schedule(config)
    _check_optimizer(config)
    if paths is not None:
        _match(config, sorted(paths))


def check_warmup(warmup_steps: int, total_steps: int) -> None:
    """Raises UserError if the warm-up is longer than the run."""
    if not 0 <= warmup_steps <= total_steps:
        raise UserError(
            f"the warm-up takes {warmup_steps} steps, expected 0 to the run's {total_steps}; shorten it or train longer"
        )


def make_schedule(config: ConfigDict, total_steps: int, warmup_steps: int) -> Schedule:
    """Builds the schedule that `config.schedule` names.

    After the warm-up the rate is `learning_rate` times
      constant: 1
      linear:   1 to `end_factor`, linearly, reached at `total_steps`
      cosine:   1 to `end_factor`, along half a cosine, reached at `total_steps` (Loshchilov and Hutter, 2017)
      rsqrt:    1 / sqrt(1 + t / `rsqrt_timescale`), t updates after the warm-up (Zhai et al., 2022); has no end

    Args:
      config: `learning_rate`, `schedule`, `warmup_constant`, `end_factor` and `rsqrt_timescale` are read.
      total_steps: updates of the whole run.
      warmup_steps: updates of the warm-up (linear, or constant at `warmup_constant`), included in `total_steps`.

    Raises:
      UserError: the warm-up is longer than the run, or `end_factor` has no meaning for the schedule.
    """
    _check_schedule(config)
    check_warmup(warmup_steps, total_steps)
    span, end, timescale = max(total_steps - warmup_steps, 1), config.end_factor, config.rsqrt_timescale
    decay = functools.partial(SCHEDULES[config.schedule], span=span, end=end, timescale=timescale)
    return Schedule(float(config.learning_rate), decay, warmup_steps, config.warmup_constant)


def _check_schedule(config: ConfigDict) -> None:
    """Raises UserError if `end_factor` is set for a schedule that does not end."""
    if config.schedule in ("constant", "rsqrt") and config.end_factor:
        raise UserError(
            f"end_factor={config.end_factor} has no meaning for schedule='{config.schedule}', which does not end; "
            "set it to 0 or use schedule='linear' or 'cosine'"
        )


def make_optimizer(config: ConfigDict, schedule: Schedule, paths: Iterable[str]) -> optax.GradientTransformation:
    """Builds the optax chain of a run; its state is float32 for parameters of any dtype (adamw_8bit: 8 bits).

    Args:
      config: `name` (adamw, adam, sgd, adafactor, lion, adamw_8bit); `b1`, `b2` and `eps` of the Adam variants (lion
        has no `eps`, and its authors use `b2` = 0.99); `min_8bit_size` (adamw_8bit: smaller leaves keep float32
        moments); `momentum` (sgd accumulates gradients, adafactor averages updates; 0 for none); `weight_decay`, and
        the pattern `weight_decay_mask` of the paths that it applies to (None for matrices and embeddings);
        `grad_clip_norm` (None for no clipping); `rates`, entries `(pattern, factor)` or
        `(pattern, factor, warmup_steps)`: the first pattern that matches a whole path multiplies its learning rate and
        may replace its warm-up, e.g. `(("vision/.*", 0.3, 1000),)`; other paths follow the schedule.
      schedule: from `make_schedule`.
      paths: of the trainable parameters, or the flat parameters themselves.

    Raises:
      UserError: a pattern matches no path, a factor is 0 or less, or the optimizer has no weight decay.
    """
    _check_optimizer(config)
    decayed, rates = _match(config, sorted(paths))
    stages = [] if config.grad_clip_norm is None else [optax.clip_by_global_norm(config.grad_clip_norm)]
    stages.append(OPTIMIZERS[config.name](config))
    if config.weight_decay:
        stages.append(optax.add_decayed_weights(config.weight_decay, decayed))
    stages.append(_scale_by_rates(schedule, rates))
    return _in_float32(optax.chain(*stages))


def _adam(config: ConfigDict) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.b1, config.b2, config.eps)


def _sgd(config: ConfigDict) -> optax.GradientTransformation:
    return optax.trace(config.momentum) if config.momentum else optax.identity()


def _adafactor(config: ConfigDict) -> optax.GradientTransformation:
    """Returns Adafactor (Shazeer and Stern 2018, arXiv 1804.04235) with the default stages of optax.adafactor."""
    average = optax.ema(config.momentum, debias=False) if config.momentum else optax.identity()
    return optax.chain(
        optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms(), average
    )


# Optimizers by name: from gradients to a direction of ascent, before weight decay and learning rate.
OPTIMIZERS: dict[str, Callable[[ConfigDict], optax.GradientTransformation]] = {
    "adamw": _adam,
    "adam": _adam,
    "sgd": _sgd,
    "adafactor": _adafactor,
    "lion": lambda config: optax.scale_by_lion(config.b1, config.b2),
    "adamw_8bit": lambda config: scale_by_adam_8bit(config.b1, config.b2, config.eps, config.min_8bit_size),
}


def _check_optimizer(config: ConfigDict) -> None:
    """Raises UserError if the config defines no valid chain for any parameter paths."""
    if config.weight_decay and config.name == "adam":
        raise UserError(
            f"weight_decay={config.weight_decay} has no meaning for optimizer 'adam'; set it to 0 or use 'adamw'"
        )
    if config.weight_decay_mask is not None:
        compile_regex(config.weight_decay_mask)
    for entry in config.rates or ():
        if not _is_rate(entry):
            raise UserError(f"rates has {entry!r}, expected (pattern, factor) or (pattern, factor, warmup_steps)")
        pattern, factor = entry[:2]
        compile_regex(pattern)
        if not 0 < factor < math.inf:
            raise UserError(
                f"rates: the factor of '{pattern}' is {factor}, expected a finite number above 0; to stop these "
                "parameters from training, freeze them by pattern, which also saves their gradients and optimizer state"
            )


def _is_rate(entry: Any) -> bool:
    """Returns whether an entry of `rates` is valid."""
    if not isinstance(entry, list | tuple) or len(entry) not in (2, 3):
        return False
    pattern, factor, warmup = (*entry, None)[:3]
    count = warmup is None or (type(warmup) is int and 0 <= warmup <= WHOLE_MAX)
    return isinstance(pattern, str) and isinstance(factor, int | float) and count


def _match(config: ConfigDict, paths: list[str]) -> tuple[dict[str, bool], dict[str, Rate]]:
    """Returns by path whether it decays, and its rate; raises UserError for a pattern that matches nothing."""
    decayed = dict.fromkeys(paths, False)
    if config.weight_decay:
        if config.weight_decay_mask is None:  # may match none, if only norms and biases train
            matched = [path for path in paths if re.fullmatch(DEFAULT_WEIGHT_DECAY_MASK, path)]
        else:
            what = f"weight_decay_mask of weight_decay={config.weight_decay}"
            matched = select(config.weight_decay_mask, paths, what=what)
        decayed |= dict.fromkeys(matched, True)
    rules: list[tuple[str, Rate]] = [
        (pattern, (factor, warmup[0] if warmup else None)) for pattern, factor, *warmup in config.rates or ()
    ]
    return decayed, cover([*rules, (".*", (1.0, None))], paths)


def _scale_by_rates(schedule: Schedule, rates: dict[str, Rate]) -> optax.GradientTransformation:
    """Multiplies updates by the negative learning rate of their paths; its state counts the updates."""

    def init(params):
        del params
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        del params
        rate = {rule: rule[0] * schedule(state.count, rule[1]) for rule in set(rates.values())}
        updates = {path: -rate[rates[path]] * value for path, value in updates.items()}
        return updates, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs `inner` on float32 copies of gradients and parameters: bfloat16 moments would not change (b2 = 0.999)."""

    def to_float32(tree):
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)

    def init(params):
        return inner.init(to_float32(params))

    def update(updates, state, params=None):
        return inner.update(to_float32(updates), state, None if params is None else to_float32(params))

    return optax.GradientTransformation(init, update)
