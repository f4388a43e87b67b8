"""LoRA adapters as peft saves them: folders of adapter_config.json and adapter_model.safetensors, read and written.

Reading is strict: every key of the file and every module that the config targets must be accounted for, or nothing is
loaded. An adapter that was read is written again with the same names and config, as long as the config describes it.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from paligemma_jax.adapt.lora.adapter import check_free, install, lora_projections
from paligemma_jax.adapt.lora.layer import LoraProjection
from paligemma_jax.adapt.lora.spec import LoraSpec
from paligemma_jax.files import hub
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.projection import Projection, depth, projections
from paligemma_jax.weights.adapters import peft_config
from paligemma_jax.weights.adapters.peft_config import PeftConfig, read_config
from paligemma_jax.weights.adapters.peft_describe import Origin, describe
from paligemma_jax.weights.adapters.peft_names import PREFIX, RELEASES, Slot, disk_name, in_memory, module_of, slots
from paligemma_jax.weights.hugging_face.folder import Folder
from train_jax.core.errors import UserError, listed
from train_jax.core.files import atomic

FILE = "adapter_model.safetensors"
Shardings = Callable[[str, jax.ShapeDtypeStruct], jax.sharding.Sharding | None]


@dataclasses.dataclass(frozen=True)
class PeftFolder:
    """An opened peft folder: its config is checked, and no array is read yet."""

    config: PeftConfig
    arrays: Folder


def open_peft(folder: str | Path) -> PeftFolder:
    """Opens a folder, or "hf://owner/name", as peft's `save_pretrained` writes it.

    Raises:
      UserError: no such folder, files that are missing or broken, or options that are not supported (lists them).
    """
    folder = hub.download(folder) if hub.is_remote(folder) else Path(folder).expanduser()
    config = read_config(folder)
    if not (folder / FILE).is_file():
        raise UserError(
            f"{folder} holds no {FILE}: save the adapter with safe_serialization=True, pickles are not read."
        )
    return PeftFolder(config, Folder(folder, FILE, disk_name))


def load_peft(
    model: PaliGemma,
    folder: str | Path | PeftFolder,
    *,
    dtype: str | None = None,
    dropout: int | float | None = None,
    shardings: Shardings | None = None,
) -> PaliGemma:
    """Attaches the LoRA of a peft folder to the base it was trained on.

    Args:
      model: changed in place; plain or quantised, without adapters on the same modules.
      folder: see `open_peft`, or the result of that.
      dtype: of A, B and magnitudes; None: as stored.
      dropout: for further training; None takes the dropout of the folder's config.
      shardings: maps a leaf's path and shape to its sharding; None: the default device.

    Returns:
      The model.

    Raises:
      UserError: as `open_peft`; keys of the file that are not used, or modules that the config targets and the file
        lacks (lists both); shapes of another model or rank. The model is then unchanged.
    """
    adapter = folder if isinstance(folder, PeftFolder) else open_peft(folder)
    config, arrays, modules = adapter.config, adapter.arrays, projections(model)
    release, adapted = _match(adapter, slots(model))
    check_free(modules, {slot.path for slot in adapted})
    ranks = {slot: config.rank(in_memory(slot.name, release)) for slot in adapted}
    alphas = {slot: config.alpha(in_memory(slot.name, release)) for slot in adapted}
    _check_shapes(arrays, ranks, config["use_dora"])
    ready = []
    for path in dict.fromkeys(slot.path for slot in adapted):
        by_layer = {slot.layer or 0: slot for slot in adapted if slot.path == path}
        layers = range(depth(modules[path]) or 1)
        spec = LoraSpec(
            tuple(ranks[by_layer[i]] if i in by_layer else 0 for i in layers),
            tuple(float(alphas[by_layer[i]]) if i in by_layer else 0.0 for i in layers),
            config["use_rslora"],
            Origin(config, release),
        )
        leaves = _read(arrays, modules[path], by_layer, spec, config["use_dora"], dtype)
        leaves = {name: _placed(f"{path}/{name}", leaf, shardings) for name, leaf in leaves.items()}
        ready.append((modules[path], spec, leaves))
    rate: int | float = config["lora_dropout"] if dropout is None else dropout
    for module, spec, leaves in ready:
        install(module, spec, leaves["lora_a"], leaves["lora_b"], leaves.get("lora_magnitude"), rate)
    return model


def _match(adapter: PeftFolder, candidates: list[Slot]) -> tuple[str, list[Slot]]:
    """Returns the release whose module names the config's targets match, and the modules that are adapted.

    A regular expression matches the names of some releases only, so each is tried, the file's own first.
    """
    config, arrays = adapter.config, adapter.arrays
    in_file = arrays.names()
    module_names = {disk_name(key): module_of(key) for key in map(arrays.key, in_file)}

    def targeted(release: str) -> list[Slot]:
        return [slot for slot in candidates if config.targets(in_memory(slot.name, release))]

    def keys(adapted: Iterable[Slot]) -> set[str]:
        return {row.theirs for slot in adapted for row in slot.rows(config["use_dora"]).values()}

    def is_own(release: str) -> bool:
        names = ((in_memory(slot.name, release), keys([slot])) for slot in candidates)
        return all(module_names.get(key, name) == name for name, each in names for key in each)

    releases = sorted(RELEASES, key=lambda release: not is_own(release))
    for release in releases:
        adapted = targeted(release)
        if adapted and keys(adapted) == in_file:
            return release, adapted
    best = releases[0]
    expected = {key: in_memory(key, best) for key in keys(targeted(best))}
    unused = sorted(arrays.key(name) for name in in_file - set(expected))
    missing = sorted(PREFIX + name for key, name in expected.items() if key not in in_file)
    raise UserError(
        f"{arrays.path} does not fit this model: not used {listed(unused)}; missing {listed(missing)}; expected the "
        f"modules of target_modules in {peft_config.FILE}: check that the adapter belongs to this model."
    )


def _check_shapes(arrays: Folder, ranks: Mapping[Slot, int], dora: bool) -> None:
    """Compares the shapes in the file's header with the model's, before any array is read."""
    stored = arrays.shapes()
    for slot, rank in ranks.items():
        shapes = slot.shapes(rank)
        for leaf, row in slot.rows(dora).items():
            expected, shape = row.stored_shape(shapes[leaf]), stored[row.theirs]
            if [n for n in shape if n != 1] != [n for n in expected if n != 1]:
                raise UserError(
                    f"{arrays.path}: {arrays.key(row.theirs)} has shape {shape}, expected {expected} for rank {rank} "
                    f"({peft_config.FILE}) on {slot.path}: the adapter belongs to another model or another config."
                )


def _read(
    arrays: Folder, module: Projection, by_layer: Mapping[int, Slot], spec: LoraSpec, dora: bool, dtype: str | None
) -> dict[str, np.ndarray]:
    """Returns the leaves of one projection's adapter, layers stacked and padded with zeros to the largest rank."""
    stack = (len(spec.ranks),) * (depth(module) is not None)
    leaves: dict[str, np.ndarray] = {}
    for layer, slot in by_layer.items():
        rank = spec.ranks[layer]
        for name, row in slot.rows(dora).items():
            array = arrays[row.theirs]
            if not jnp.issubdtype(array.dtype, jnp.floating):
                raise UserError(f"{arrays.path}: {row.theirs} is {array.dtype}, expected floats: save it again.")
            array = row.read(array, slot.shapes(rank)[name], f"{arrays.path}: {row.theirs}")
            shape = (*stack, *slot.shapes(spec.rank)[name])
            if name not in leaves:
                leaves[name] = np.zeros(shape, dtype or array.dtype)
            elif dtype is None:
                leaves[name] = leaves[name].astype(np.promote_types(leaves[name].dtype, array.dtype), copy=False)
            at = (layer,) * len(stack)
            leaves[name][at + _used(name, rank)] = array
    return leaves


def _used(leaf: str, rank: int) -> tuple:
    """Returns the index of the part of one layer's leaf that a lower rank uses."""
    return {"lora_a": (..., slice(rank)), "lora_b": (slice(rank),), "lora_magnitude": (...,)}[leaf]


def _placed(path: str, array: np.ndarray, shardings: Shardings | None) -> jax.Array:
    sharding = shardings(path, jax.ShapeDtypeStruct(array.shape, array.dtype)) if shardings else None
    return jax.device_put(array, sharding)


def save_peft(
    model: PaliGemma, folder: str | Path, *, base: str | Path | None = None, release: str | None = None
) -> None:
    """Writes the adapters of a model as a folder that peft opens on the same base.

    Args:
      model: with adapters; not changed.
      folder: created if missing; an adapter in it is replaced.
      base: the base's location for peft, a folder or a name on the Hub; None: as read, or none.
      release: release of transformers whose module names the file uses: "5", "4.52" or "4.41", each valid until the
        next; None: as read, or "5".

    Raises:
      UserError: no adapters, an unknown release, or adapters that one peft config cannot describe.
    """
    if release is not None and release not in RELEASES:
        raise UserError(f"release is {release!r}, expected one of {', '.join(RELEASES)}: choose one of these.")
    modules = lora_projections(model)
    if not modules:
        raise UserError("the model has no LoRA adapters to save: load one or attach one first.")
    config, release = describe(modules, slots(model), base, release)
    arrays = {}
    for slot in slots(model):
        module = modules.get(slot.path)
        rank = module.lora_spec.ranks[slot.layer or 0] if module is not None else 0
        if module is not None and rank:
            arrays |= _written(slot, module, rank, release)
    folder = Path(folder).expanduser()
    with atomic(folder / FILE) as draft:
        save_file(arrays, draft, metadata={"format": "pt"})
    (folder / peft_config.FILE).write_text(config.text)


def _written(slot: Slot, module: LoraProjection, rank: int, release: str) -> dict[str, np.ndarray]:
    """Returns one module's arrays under peft's keys."""
    arrays = {}
    for leaf, row in slot.rows(module.lora_magnitude is not None).items():
        array = np.asarray(getattr(module, leaf)[...])
        array = array if slot.layer is None else array[slot.layer]
        array = row.write(array[_used(leaf, rank)])
        if slot.conv and leaf != "lora_a":
            array = array[None, :, None, None] if leaf == "lora_magnitude" else array[:, :, None, None]
        part = row.theirs.removeprefix(f"{slot.name}.")
        arrays[f"{PREFIX}{in_memory(slot.name, release)}.{part}"] = np.ascontiguousarray(array)
    return arrays
