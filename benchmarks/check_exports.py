"""Loads exports of save_hugging_face and save_peft with transformers and peft, and compares logits with ours.

    python benchmarks/check_exports.py [FOLDER ...]

Needs torch, transformers and peft (the extra [bench]); run it by hand (docs/weights.md has the output). Without
arguments it exports to a temporary folder: the models of the tests' golden cases (PaliGemma 1 and 2, a big_vision file)
and "tiny", in one file and in shards; models of other sizes with random weights, one with a vocabulary of 257,152 rows
padded to 257,216; and, for PaliGemma 1 and 2, every kind of adapter that save_peft writes.

Prints for each folder the largest logit difference (float32), whether 8 greedy tokens are equal, and whether
AutoProcessor and our preprocessing of a prompt agree; for each adapter the largest logit difference, the change from
the base, and peft's warnings. Exits with status 1 if anything differs.
"""

import dataclasses
import platform
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

import paligemma_jax as pg
from paligemma_jax.adapt.lora.adapter import lora_projections
from paligemma_jax.images.preprocessing import Preprocessing
from paligemma_jax.models.gemma import GemmaConfig
from paligemma_jax.models.paligemma import PaliGemma, PaliGemmaConfig
from paligemma_jax.models.vit import ViTConfig
from paligemma_jax.weights import save_big_vision, save_hugging_face, save_peft
from train_jax.core import param_tree

GOLDEN = Path(__file__).parent.parent / "tests/golden"
SOURCES = {
    "paligemma": (GOLDEN / "hf_paligemma", None),
    "paligemma2": (GOLDEN / "hf_paligemma2", None),
    "big_vision": (GOLDEN / "bigvision_paligemma/params.npz", None),
    "tiny": ("tiny", "tiny"),
}
VISION = ViTConfig(image_size=42, patch_size=14, width=24, depth=3, mlp_dim=40, num_heads=3)
SIZES = dict(vocab_size=500, width=40, depth=3, mlp_dim=72, num_heads=4, head_dim=16)
RANDOM = {
    "random 1": GemmaConfig(**SIZES),
    "random 2": GemmaConfig(
        **SIZES,
        num_kv_heads=2,
        post_norms=True,
        attn_softcap=50.0,
        final_softcap=30.0,
        sliding_window=8,
        query_scale=20**-0.5,
    ),
}
PADDED = GemmaConfig(**SIZES | {"vocab_size": 257_152, "depth": 1})  # as in big_vision; transformers has 257,216
ATTENTION = r"decoder/.*/(q_proj|o_proj)"
ADAPTERS = {
    "LoRA": dict(targets=ATTENTION, rank=4, alpha=8.0),
    "all modules": dict(targets=r".*(_proj|fc1|fc2|linear|patch_embedding)", rank=3, alpha=8.0),
    "rank_pattern": dict(
        targets=r"decoder/.*",
        rank=4,
        alpha=8.0,
        rank_pattern={r"decoder/layers/0/.*": 2, r".*/down_proj": 6},
        alpha_pattern={r".*/o_proj": 3.0},
    ),
    "layers": dict(targets=r"decoder/.*", rank=4, alpha=8.0, layers=[1]),
    "rsLoRA": dict(targets=ATTENTION, rank=4, alpha=8.0, rslora=True),
    "DoRA": dict(targets=r".*(_proj|fc1|fc2|linear)", rank=4, alpha=8.0, dora=True),
    "DoRA, ranks": dict(targets=r".*/(q_proj|fc1)", rank=4, alpha=8.0, dora=True, rank_pattern={".*/1/.*/fc1": 1}),
}
TOLERANCE = 2e-4  # as in the golden READMEs, for float32
PROMPT, SUFFIX, NEW_TOKENS = 6, 4, 8


def random_model(decoder: GemmaConfig) -> PaliGemma:
    """Returns a model with random weights, norm scales and biases."""
    preprocessing = Preprocessing.siglip(VISION.image_size)
    image_token = decoder.vocab_size - 1
    config = PaliGemmaConfig(vision=VISION, decoder=decoder, preprocessing=preprocessing, image_token=image_token)
    model, rng = PaliGemma(config, rngs=nnx.Rngs(0)), np.random.default_rng(2)
    return param_tree.assign(
        model,
        {path: jnp.asarray(0.2 * rng.normal(size=a.shape), a.dtype) for path, a in param_tree.flatten(model).items()},
    )


def export(folder: Path) -> list[Path]:
    """Exports every source, the first one in shards too; returns the folders."""
    folders = []
    for name, decoder in RANDOM.items():
        save_hugging_face(random_model(decoder), folder / name)
        folders.append(folder / name)
    save_big_vision(random_model(PADDED), folder / "padded.npz")
    padded = pg.load(folder / "padded.npz", vocab_size=257_216)
    save_hugging_face(padded, folder / "padded")
    folders.append(folder / "padded")
    for name, (source, tokenizer) in SOURCES.items():
        model = pg.load(source)
        save_hugging_face(model, folder / name, tokenizer)
        folders.append(folder / name)
        if name == "paligemma":
            save_hugging_face(model, folder / "shards", tokenizer, max_shard_size=100_000)
            folders.append(folder / "shards")
    return folders


@dataclasses.dataclass(frozen=True)
class Batch:
    """Two images with prompts and answers, for our model and that of transformers."""

    images: np.ndarray
    tokens: np.ndarray
    suffix: np.ndarray
    patches: int
    image_token: int

    @classmethod
    def of(cls, model: PaliGemma) -> "Batch":
        """Returns a random batch for a model."""
        config, rng = model.config, np.random.default_rng(0)
        size = config.vision.image_size
        images = rng.uniform(-1, 1, (2, size, size, 3)).astype(np.float32)
        top = min(config.decoder.vocab_size, config.image_token)
        tokens = rng.integers(6, top, (2, PROMPT + SUFFIX)).astype(np.int32)
        tokens[:, 0] = 2
        suffix = np.zeros_like(tokens)
        suffix[:, PROMPT:] = 1
        return cls(images, tokens, suffix, config.vision.num_patches, config.image_token)

    def theirs(self, length: int = PROMPT + SUFFIX) -> dict:
        """Returns the arguments of the transformers model, for the first `length` text tokens."""
        import torch

        image = np.full((2, self.patches), self.image_token)
        ids = torch.tensor(np.concatenate([image, self.tokens[:, :length]], axis=1))
        types = torch.tensor(np.concatenate([np.zeros_like(image), self.suffix[:, :length]], axis=1))
        pixels = torch.tensor(self.images.transpose(0, 3, 1, 2))
        return dict(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), token_type_ids=types)

    def logits(self, theirs) -> np.ndarray:
        """Returns the logits of the transformers model at the text positions."""
        import torch

        with torch.no_grad():
            return theirs(**self.theirs()).logits[:, self.patches :].numpy()

    def gap(self, ours: PaliGemma, theirs) -> float:
        """Returns the largest logit difference."""
        logits, _ = ours(self.images, self.tokens, self.suffix)
        return float(np.abs(np.asarray(logits) - self.logits(theirs)).max())


def load_theirs(folder: Path):
    """Loads a folder with transformers; returns the model and the keys that are missing or unused."""
    import torch
    from transformers import PaliGemmaForConditionalGeneration

    model, info = PaliGemmaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    return model.eval(), sorted(set(info["missing_keys"]) - {"lm_head.weight"}) + sorted(info["unexpected_keys"])


def compare(folder: Path) -> bool:
    """Prints a line for a folder; returns whether the implementations agree."""
    import torch

    ours = pg.load(folder)
    theirs, leftover = load_theirs(folder)
    batch = Batch.of(ours)
    gap = batch.gap(ours, theirs)
    options = dict(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        generated = theirs.generate(**batch.theirs(PROMPT), **options)[:, batch.patches + PROMPT :].numpy()
    prompts = batch.tokens[:, :PROMPT]
    greedy = np.asarray(pg.generate(ours, batch.images, prompts, max_new_tokens=NEW_TOKENS, eos_id=-1))
    same = bool((greedy == generated).all())
    processor = compare_processor(folder, batch.patches) if (folder / "tokenizer.model").exists() else "no tokenizer"
    keys, greedy = leftover or "all used", "equal" if same else "DIFFERS"
    print(f"{folder.name:<12} logit gap {gap:.1e}  greedy {greedy}  keys {keys}  processor {processor}")
    return gap <= TOLERANCE and same and not leftover and processor in ("equal", "no tokenizer")


def compare_adapter(base: Path, name: str, folder: Path) -> bool:
    """Exports an adapter with random weights, loads it with peft and prints a line; returns whether they agree."""
    from peft import PeftModel

    ours, rng = pg.attach_lora(pg.load(base), **ADAPTERS[name], rngs=nnx.Rngs(0)), np.random.default_rng(4)
    for module in lora_projections(ours).values():
        used = np.asarray(module.lora_a[...]) != 0  # zero beyond the rank of a layer
        used = used.reshape(*used.shape[: used.ndim - len(module.in_shape) - 1], -1, used.shape[-1]).any(axis=-2)
        b = module.lora_b[...]
        mask = used.reshape(*used.shape, *[1] * (b.ndim - used.ndim))
        module.lora_b[...] = jnp.asarray(0.2 * rng.normal(size=b.shape) * mask, b.dtype)
        if module.lora_magnitude is not None:
            module.lora_magnitude[...] *= jnp.asarray(rng.uniform(0.5, 2.0, module.lora_magnitude.shape), jnp.float32)
    save_peft(ours, folder)
    theirs, _ = load_theirs(base)
    batch = Batch.of(ours)
    before = batch.logits(theirs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted = PeftModel.from_pretrained(theirs, folder).eval()
    messages = [str(warning.message).splitlines()[0] for warning in caught if "adapter" in str(warning.message)]
    gap, change = batch.gap(ours, adapted), float(np.abs(batch.logits(adapted) - before).max())
    print(f"{base.name:<12} {name:<14} logit gap {gap:.1e}  to the base {change:.1e}  warnings {messages or 'none'}")
    return gap <= TOLERANCE and change > 100 * TOLERANCE and not messages


def compare_processor(folder: Path, patches: int) -> str:
    """Compares the token ids and pixels of transformers' processor with ours; returns "equal" or the difference."""
    from PIL import Image
    from transformers import AutoProcessor

    prompt = "answer en How many red cubes are there? <loc0012>"
    size = pg.load(folder).config.vision.image_size
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (size + 9, size + 5, 3), np.uint8))
    batch = AutoProcessor.from_pretrained(folder)(images=image, text=prompt, return_tensors="np")
    tokenizer = pg.load_tokenizer(folder)
    expected = [tokenizer.bos_id, *tokenizer.encode(prompt), *tokenizer.separator_ids]
    ids = batch["input_ids"][0].tolist()
    if ids != [tokenizer.image_id] * patches + expected:
        return f"DIFFERS: {ids[patches:]} against {expected}"
    pixels = pg.load(folder).config.preprocessing.apply(np.asarray(image))
    gap = np.abs(batch["pixel_values"][0].transpose(1, 2, 0) - pixels).max()
    return "equal" if gap <= 1 / 127 else f"DIFFERS: pixels by {gap:.3f}"


def main(folders: list[str]) -> int:
    """Compares folders, or all exports if none is given; returns the exit status."""
    packages = ("torch", "transformers", "peft", "safetensors", "jax", "flax")
    print(f"Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in packages))
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        agree = [compare(path) for path in [Path(folder) for folder in folders] or export(root)]
        if not folders:
            bases = [root / "random 1", root / "random 2", root / "paligemma"]
            agree += [compare_adapter(base, name, root / f"{base.name}, {name}") for base in bases for name in ADAPTERS]
    return 0 if all(agree) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
