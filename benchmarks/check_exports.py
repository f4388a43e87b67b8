"""Opens folders that save_hugging_face wrote with transformers, and compares logits and greedy tokens with ours.

    python benchmarks/check_exports.py [FOLDER ...]

Needs torch and transformers beside this package; run by hand. Without arguments it exports the models of the tests'
golden cases (PaliGemma 1 and 2, a file of big_vision) and "tiny" to a temporary folder, in one file and in shards.
For each folder it prints the largest logit difference (float32), whether 8 greedy tokens are equal, and what
AutoProcessor makes of a prompt against our own prompt, and exits with status 1 if anything differs.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

import paligemma_jax as pg
from paligemma_jax.weights import save_hugging_face

GOLDEN = Path(__file__).parent.parent / "tests/golden"
SOURCES = {
    "paligemma": (GOLDEN / "hf_paligemma", None),
    "paligemma2": (GOLDEN / "hf_paligemma2", None),
    "big_vision": (GOLDEN / "bigvision_paligemma/params.npz", None),
    "tiny": ("tiny", "tiny"),
}
TOLERANCE = 2e-4  # as the golden READMEs ask of float32
PROMPT, SUFFIX, NEW_TOKENS = 6, 4, 8


def export(folder: Path) -> list[Path]:
    """Writes every source; the first one in shards as well."""
    folders = []
    for name, (source, tokenizer) in SOURCES.items():
        model = pg.load(source)
        save_hugging_face(model, folder / name, tokenizer)
        folders.append(folder / name)
        if name == "paligemma":
            save_hugging_face(model, folder / "shards", tokenizer, max_shard_size=100_000)
            folders.append(folder / "shards")
    return folders


def compare(folder: Path) -> bool:
    """Prints one line about a folder; whether both agree."""
    import torch
    from transformers import PaliGemmaForConditionalGeneration

    ours = pg.load(folder)
    theirs, info = PaliGemmaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    theirs.eval()
    config, rng = ours.config, np.random.default_rng(0)
    size, patches = config.vision.image_size, config.vision.num_patches
    images = rng.uniform(-1, 1, (2, size, size, 3)).astype(np.float32)
    top = min(config.decoder.vocab_size, config.image_token)
    tokens = rng.integers(6, top, (2, PROMPT + SUFFIX)).astype(np.int32)
    tokens[:, 0] = 2
    suffix = np.zeros_like(tokens)
    suffix[:, PROMPT:] = 1

    def inputs(tokens, types):
        image = np.full((2, patches), config.image_token)
        ids = torch.tensor(np.concatenate([image, tokens], axis=1))
        types = torch.tensor(np.concatenate([np.zeros_like(image), types], axis=1))
        pixels = torch.tensor(images.transpose(0, 3, 1, 2))
        return dict(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), token_type_ids=types)

    with torch.no_grad():
        expected = theirs(**inputs(tokens, suffix)).logits[:, patches:].numpy()
        batch = inputs(tokens[:, :PROMPT], suffix[:, :PROMPT])
        generated = theirs.generate(
            **batch, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
        )[:, patches + PROMPT :].numpy()
    logits, _ = ours(images, tokens, suffix)
    gap = float(np.abs(np.asarray(logits) - expected).max())
    greedy = np.asarray(pg.generate(ours, images, tokens[:, :PROMPT], max_new_tokens=NEW_TOKENS, eos_id=-1))
    same = bool((greedy == generated).all())
    leftover = sorted(set(info["missing_keys"]) - {"lm_head.weight"}) + sorted(info["unexpected_keys"])
    words = compare_processor(folder, patches) if (folder / "tokenizer.model").exists() else "no tokenizer"
    keys, tokens_are = leftover or "all used", "equal" if same else "DIFFERS"
    print(f"{folder.name:<12} logit gap {gap:.1e}  greedy {tokens_are}  keys {keys}  processor {words}")
    return gap <= TOLERANCE and same and not leftover and words in ("equal", "no tokenizer")


def compare_processor(folder: Path, patches: int) -> str:
    """Whether transformers' processor makes the ids and pixels of a prompt that ours does."""
    from PIL import Image
    from transformers import AutoProcessor

    prompt = "answer en How many red cubes are there? <loc0012>"
    size = pg.load(folder).config.vision.image_size
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (size + 9, size + 5, 3), np.uint8))
    batch = AutoProcessor.from_pretrained(folder)(images=image, text=prompt, return_tensors="np")
    tokenizer = pg.load_tokenizer(folder)
    expected = [tokenizer.bos_id, *tokenizer.encode(prompt), *tokenizer.separator_ids]
    found = batch["input_ids"][0].tolist()
    if found != [tokenizer.image_id] * patches + expected:
        return f"DIFFERS: {found[patches:]} against {expected}"
    pixels = pg.load(folder).config.preprocessing.apply(np.asarray(image))
    gap = np.abs(batch["pixel_values"][0].transpose(1, 2, 0) - pixels).max()
    return "equal" if gap <= 1 / 127 else f"DIFFERS: pixels by {gap:.3f}"


def main(folders: list[str]) -> int:
    """Exit status."""
    with tempfile.TemporaryDirectory() as temporary:
        paths = [Path(folder) for folder in folders] or export(Path(temporary))
        return 0 if all([compare(path) for path in paths]) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
