"""Learning-rate schedules and optax chains from a config, for flat parameters `{"decoder/layers/.../kernel": array}`.

The order of a chain is fixed: gradients to float32, one global-norm clip over all of them, the optimizer's own
statistics, decoupled weight decay, and last the rate (with a sign), which may differ by path:

    update = -rate(path, step) * (direction + weight_decay * parameter)

so the decay is multiplied by the rate, as in torch's and optax's AdamW (decoupled from the gradient statistics as in
Loshchilov and Hutter, 2019, arXiv 1711.05101). big_vision adds it after the rate instead, and its default mask matches
no kernel of Gemma; the default here matches them all.
"""

import dataclasses
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from train_jax.adamw_8bit import scale_by_adam_8bit
from train_jax.errors import UserError
from train_jax.patterns import cover, did_you_mean, select

# Matrices of the model and of adapters; biases, norm scales, logit scales and position embeddings are left alone.
DEFAULT_WEIGHT_DECAY_MASK = r"(.*/)?(kernel|embedding|lora_a|lora_b)"

Step = int | Array  # number of updates made so far


@dataclasses.dataclass(frozen=True)
class Schedule:
    """An optax schedule: linear warm-up from 0, then decay from `peak`.

    Attributes:
      peak: learning rate at the end of the warm-up.
      decay: factor of the peak as a function of the updates made since the warm-up ended (0 or more).
      warmup_steps: length of the warm-up in updates; 0 starts at the peak.
    """

    peak: float
    decay: Callable[[Float[Array, ""]], Float[Array, ""]]
    warmup_steps: int

    def __call__(self, step: Step, warmup_steps: int | None = None) -> Float[Array, ""]:
        """Rate of the update after `step` updates; `warmup_steps` replaces the warm-up (the decay keeps its place)."""
        step = jnp.asarray(step, jnp.float32)
        warmup_steps = self.warmup_steps if warmup_steps is None else warmup_steps
        ramp = jnp.minimum(step / max(warmup_steps, 1), 1.0) if warmup_steps else 1.0
        return self.peak * ramp * self.decay(jnp.maximum(step - self.warmup_steps, 0.0))


def make_schedule(config: ConfigDict, total_steps: int, warmup_steps: int) -> Schedule:
    """Builds the schedule that `config.schedule` names.

    After the warm-up the rate is `learning_rate` times
      constant: 1
      linear:   1 to `end_factor` in a straight line, reached at `total_steps`
      cosine:   1 to `end_factor` along half a cosine, reached at `total_steps` (Loshchilov and Hutter, 2017)
      rsqrt:    1 / sqrt(1 + t / `rsqrt_timescale`), t updates after the warm-up (Zhai et al., 2022), knows no end

    Args:
      config: `learning_rate`, `schedule`, `end_factor`, `rsqrt_timescale` are read.
      total_steps: updates of the whole run.
      warmup_steps: updates of the linear warm-up, contained in `total_steps`.

    Raises:
      UserError: unknown schedule, negative rate, a warm-up longer than the run, or an end factor that has no meaning.
    """
    if config.learning_rate < 0:
        raise UserError(f"learning_rate is {config.learning_rate}, expected 0 or more; change optimizer.learning_rate")
    if not 0 <= warmup_steps <= total_steps:
        raise UserError(
            f"the warm-up takes {warmup_steps} steps, expected 0 to the run's {total_steps}; shorten it or train longer"
        )
    if config.schedule in ("constant", "rsqrt") and config.end_factor:
        raise UserError(
            f"end_factor={config.end_factor} has no meaning for schedule='{config.schedule}', which does not end; "
            "set it to 0 or use schedule='linear' or 'cosine'"
        )
    if config.schedule == "rsqrt" and not config.rsqrt_timescale > 0:
        raise UserError(f"rsqrt_timescale is {config.rsqrt_timescale}, expected a number of steps above 0; change it")
    span, end, timescale = max(total_steps - warmup_steps, 1), config.end_factor, config.rsqrt_timescale

    decays = {
        "constant": jnp.ones_like,
        "linear": lambda t: 1.0 + (end - 1.0) * jnp.minimum(t / span, 1.0),
        "cosine": lambda t: end + (1.0 - end) * 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.minimum(t / span, 1.0))),
        "rsqrt": lambda t: jax.lax.rsqrt(1.0 + t / timescale),
    }
    return Schedule(float(config.learning_rate), _choose(decays, config.schedule, "schedule"), warmup_steps)


def make_optimizer(config: ConfigDict, schedule: Schedule, paths: Iterable[str]) -> optax.GradientTransformation:
    """Builds the optax chain of a run; its state is float32 whatever the parameters' dtype (8 bits: adamw_8bit's).

    Args:
      config: `name` (adamw, adam, sgd, adafactor, lion, adamw_8bit); `b1`, `b2`, `eps` (Adam's kinds; lion has no
        `eps`, and its authors' `b2` is 0.99); `min_8bit_size` (adamw_8bit: smaller leaves keep float32 moments);
        `momentum` (0 for none: sgd's sums gradients, adafactor's averages its updates); `weight_decay` and the pattern
        `weight_decay_mask` of the paths it reaches (None for matrices and embeddings); `grad_clip_norm` (None for no
        clipping); `rates`, entries `(pattern, factor)` or `(pattern, factor, warmup_steps)`: the first pattern that
        matches a whole path multiplies its rate and may replace its warm-up, e.g. `(("vision/.*", 0.3, 1000),)`; paths
        without a match keep the schedule.
      schedule: from `make_schedule`.
      paths: of the trainable parameters, or the flat parameters themselves.

    Raises:
      UserError: unknown optimizer, a pattern that matches no path, a factor of 0, decay where it has no meaning.
    """
    paths = sorted(paths)
    stages = []
    if config.grad_clip_norm is not None:
        if not config.grad_clip_norm > 0:
            raise UserError(f"grad_clip_norm is {config.grad_clip_norm}, expected a norm above 0, or None for no clip")
        stages.append(optax.clip_by_global_norm(config.grad_clip_norm))
    stages.append(_direction(config))
    if config.weight_decay:
        stages.append(optax.add_decayed_weights(config.weight_decay, _decay_mask(config, paths)))
    stages.append(_scale_by_rates(schedule, _rates_by_path(config.rates, paths)))
    return _in_float32(optax.chain(*stages))


def _direction(config: ConfigDict) -> optax.GradientTransformation:
    """The optimizer itself: from gradients to a direction of ascent, before decay and rate."""

    def adam():
        return optax.scale_by_adam(config.b1, config.b2, config.eps)

    def adam_8bit():
        return scale_by_adam_8bit(config.b1, config.b2, config.eps, config.min_8bit_size)

    def sgd():
        return optax.trace(config.momentum) if config.momentum else optax.identity()

    def adafactor():  # Shazeer and Stern (2018), arXiv 1804.04235, with the parts optax.adafactor has by default
        average = optax.ema(config.momentum, debias=False) if config.momentum else optax.identity()
        return optax.chain(
            optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms(), average
        )

    optimizers = {
        "adamw": adam,
        "adam": adam,
        "sgd": sgd,
        "adafactor": adafactor,
        "lion": lambda: optax.scale_by_lion(config.b1, config.b2),
        "adamw_8bit": adam_8bit,
    }
    return _choose(optimizers, config.name, "name")()


def _decay_mask(config: ConfigDict, paths: list[str]) -> dict[str, bool]:
    """Which paths decay."""
    if config.name == "adam":
        raise UserError(
            f"weight_decay={config.weight_decay} has no meaning for optimizer 'adam'; set it to 0 or use 'adamw'"
        )
    pattern = config.weight_decay_mask or DEFAULT_WEIGHT_DECAY_MASK
    reached = set(select(pattern, paths, what=f"weight_decay_mask of weight_decay={config.weight_decay}"))
    return {path: path in reached for path in paths}


def _rates_by_path(rates: Iterable[tuple], paths: list[str]) -> dict[str, tuple[float, int | None]]:
    """Factor and own warm-up (None: the schedule's) of every path."""
    rules: list[tuple[str, tuple[float, int | None]]] = []
    for entry in rates or ():
        if not isinstance(entry, list | tuple) or len(entry) not in (2, 3):
            raise UserError(f"rates has {entry!r}, expected (pattern, factor) or (pattern, factor, warmup_steps)")
        pattern, factor, warmup_steps = (*entry, None)[:3]
        if not factor > 0:
            raise UserError(
                f"rates: the factor of '{pattern}' is {factor}, expected a number above 0; to stop these parameters "
                "from training, freeze them by pattern, which also saves their gradients and optimizer state"
            )
        rules.append((pattern, (factor, warmup_steps)))
    return cover([*rules, (".*", (1.0, None))], paths)  # refuses a rule that reaches nothing


def _scale_by_rates(schedule: Schedule, rates: dict[str, tuple[float, int | None]]) -> optax.GradientTransformation:
    """Multiplies by minus the rate of each path; counts the updates made."""

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
    """Runs `inner` on float32 copies of gradients and parameters: bfloat16 moments would stop moving (b2 = 0.999)."""

    def to_float32(tree):
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)

    def init(params):
        return inner.init(to_float32(params))

    def update(updates, state, params=None):
        return inner.update(to_float32(updates), state, None if params is None else to_float32(params))

    return optax.GradientTransformation(init, update)


def _choose(choices: dict, name: str, field: str):
    """The choice of that name, or a sentence with the names that exist and the nearest of them."""
    if name not in choices:
        advice = did_you_mean(name, choices) or "; correct it"
        raise UserError(f"optimizer.{field} is '{name}', expected one of {', '.join(choices)}{advice}")
    return choices[name]
