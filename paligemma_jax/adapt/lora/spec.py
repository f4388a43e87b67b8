"""Ranks and scales of LoRA adapters, for every layer of a stacked projection.

Layers are stacked, so lower ranks are padded with zeros to the largest. A zero column of A and the zero row of B that
belongs to it get no gradient, so padding stays zero in training, and so do layers without an adapter.
"""

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence

from train_jax.core import patterns
from train_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class LoraSpec:
    """Ranks and scales of one projection's adapter.

    Attributes:
      ranks: r of every layer, 0 if it has no adapter; one entry for a projection that is not stacked.
      alphas: alpha of every layer.
      rslora: whether s is alpha / sqrt(r) (Kalajdzievski 2023) instead of alpha / r.
      origin: data of the file that it was read from, for a writer of the same format.
    """

    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    rslora: bool = False
    origin: Hashable = None

    @property
    def rank(self) -> int:
        """The largest rank, which the arrays have."""
        return max(self.ranks)

    @property
    def scales(self) -> tuple[float, ...]:
        """The scale s of every layer, 0 if it has no adapter."""
        pairs = zip(self.ranks, self.alphas, strict=True)
        return tuple(alpha / (math.sqrt(r) if self.rslora else r) if r else 0.0 for r, alpha in pairs)


def layer_paths(path: str, depth: int | None) -> list[str]:
    """Returns the path of every layer of a stacked projection ("decoder/layers/3/mlp/up_proj"), or `path` itself."""
    if depth is None:
        return [path]
    head, tail = path.split("layers/", 1)
    return [f"{head}layers/{i}/{tail}" for i in range(depth)]


def make_specs(
    depths: Mapping[str, int | None],
    rank: int,
    alpha: int | float,
    *,
    rslora: bool = False,
    layers: Sequence[int] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, int | float] | None = None,
) -> dict[str, LoraSpec]:
    """Returns the spec of every adapted projection; projections without any of `layers` are left out.

    Args:
      depths: number of layers by path, None for a projection that is not stacked.
      rank, alpha, rslora, layers, rank_pattern, alpha_pattern: as in `attach_lora`.

    Raises:
      UserError: a pattern that matches nothing, layers that no projection has, or a rank below 1.
    """
    paths = [path for name, depth in depths.items() for path in layer_paths(name, depth)]
    ranks = _by_pattern(rank_pattern or {}, rank, paths, "rank_pattern")
    alphas = _by_pattern(alpha_pattern or {}, alpha, paths, "alpha_pattern")
    low = {r for r in (rank, *ranks.values()) if r < 1}
    if low:
        raise UserError(f"lora has rank {min(low)}, expected 1 or more: to leave layers out, give layers=.")
    if layers is not None:
        deepest = max((depth or 0 for depth in depths.values()), default=0)
        outside = sorted(i for i in layers if not 0 <= i < deepest)
        if outside or not layers:
            raise UserError(
                f"lora layers are {list(layers)}, expected some of 0 to {deepest - 1}, those of the projections that "
                "targets match: correct layers or leave it out."
            )
    specs = {}
    for name, depth in depths.items():
        adapted = [layers is None or (depth is not None and i in layers) for i in range(depth or 1)]
        if any(adapted):
            paths = layer_paths(name, depth)
            specs[name] = LoraSpec(
                tuple(ranks[path] if is_adapted else 0 for path, is_adapted in zip(paths, adapted, strict=True)),
                tuple(float(alphas[path]) for path in paths),
                rslora,
            )
    return specs


def _by_pattern(pattern: Mapping[str, int | float], default: int | float, paths: Sequence[str], what: str) -> dict:
    """Returns for each path the value of the first pattern that matches it in full, else the default."""
    for each in pattern:
        patterns.select(each, paths, what=f"lora {what}")
    return patterns.cover([*pattern.items(), (".*", default)], paths, allow_unused=True)
