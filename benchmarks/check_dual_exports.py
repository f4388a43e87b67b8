"""Loads SigLIP and CLIP exports of save_hugging_face with transformers, and compares outputs with ours.

    python benchmarks/check_dual_exports.py

Needs torch and transformers (the extra [bench]); run it by hand (docs/weights.md has the output). Exports to a
temporary folder, in float32: the models of the tests' golden cases with golden tokenizers of the same kind, and the
tiny variant with random weights. Prints for each folder the largest difference of embeddings and logits, whether the
processor's tokens of three texts and pixels of an image equal ours, and whether all keys are used. Exits with status 1
if a difference exceeds the tolerance of the golden cases.
"""

import sys
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import paligemma_jax as pg
from train_jax.core import param_tree

GOLDEN = Path(__file__).parent.parent / "tests/golden"
# Models to export and their tokenizers, whose vocabularies are larger than those of the golden models.
SOURCES = {
    "golden SigLIP": (GOLDEN / "hf_siglip", GOLDEN / "text_tokenizers/siglip"),
    "golden CLIP": (GOLDEN / "hf_clip", GOLDEN / "text_tokenizers/clip"),
    "golden big_vision file": (GOLDEN / "bigvision_siglip/params.npz", GOLDEN / "text_tokenizers/siglip"),
    "tiny, random weights": ("random:siglip-tiny", None),
}
TEXTS = ["A red cube.", "two small metal spheres, beside the big green cylinder", "what's left?"]
EMBEDS, LOGITS = 2e-5, 2e-4  # tolerances, as in the golden READMEs for float32


def randomized(model: pg.DualEncoder) -> pg.DualEncoder:
    """Returns the model with all weights random, including norms and biases."""
    rng = np.random.default_rng(0)
    arrays = {
        path: jnp.asarray(0.1 * rng.normal(size=a.shape), a.dtype) for path, a in param_tree.flatten(model).items()
    }
    return param_tree.assign(model, arrays)


def compare(name: str, source: str | Path, tokenizer: Path | None, folder: Path) -> bool:
    """Exports one model and prints a row; returns whether everything agrees."""
    import torch
    import transformers

    model = pg.load(source)
    model = randomized(model) if str(source).startswith("random:") else model
    pg.weights.save_hugging_face(model, folder, tokenizer)
    theirs, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    config, rng = model.config, np.random.default_rng(1)
    size, length = config.vision.image_size, config.text.length
    images = rng.uniform(-1, 1, (3, size, size, 3)).astype(np.float32)
    tokens = rng.integers(0, config.text.vocab_size, (3, length)).astype(np.int32)
    with torch.no_grad():
        inputs = dict(pixel_values=torch.tensor(images.transpose(0, 3, 1, 2)), input_ids=torch.tensor(tokens).long())
        outputs = theirs.eval()(**inputs)
    embeds = model(jnp.asarray(images), jnp.asarray(tokens))[:2]
    gaps = [
        float(np.abs(np.asarray(ours) - other.numpy()).max())
        for ours, other in zip(embeds, (outputs.image_embeds, outputs.text_embeds), strict=True)
    ]
    logits = float(np.abs(np.asarray(model.logits(*embeds)) - outputs.logits_per_image.numpy()).max())
    keys_used = not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    same_tokens = tokenizer is None or _same_tokens(folder, length)
    same_pixels = _same_pixels(folder, config.preprocessing)
    print(f"| {name} | {max(gaps):.1e} | {logits:.1e} | {same_tokens} | {same_pixels} | {keys_used} |", flush=True)
    return max(gaps) < EMBEDS and logits < LOGITS and same_tokens and same_pixels and keys_used


def _same_tokens(folder: Path, length: int) -> bool:
    """Returns whether transformers' tokenizer of the folder returns our tokens."""
    import transformers

    ours, _ = pg.load_text_tokenizer(folder, length)(TEXTS)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ids = theirs(TEXTS, padding="max_length", truncation=True, max_length=length)["input_ids"]
    return bool(np.array_equal(ours, ids))


def _same_pixels(folder: Path, preprocessing) -> bool:
    """Returns whether transformers' image processor of the folder returns our pixels."""
    import transformers

    image = np.random.default_rng(2).integers(0, 256, (60, 80, 3)).astype(np.uint8)
    theirs = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")(image, return_tensors="np")
    ours = preprocessing.apply(image)
    if preprocessing.source == "big_vision":  # transformers lacks its resize
        return theirs["pixel_values"][0].transpose(1, 2, 0).shape == ours.shape
    return bool(np.allclose(theirs["pixel_values"][0].transpose(1, 2, 0), ours, atol=1e-6))


def main() -> int:
    """Prints the table and returns the exit status."""
    print("| folder | embeddings | logits | tokens | pixels | keys |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        equal = [
            compare(name, source, tokenizer, Path(folder) / str(index))
            for index, (name, (source, tokenizer)) in enumerate(SOURCES.items())
        ]
    return 0 if all(equal) else 1


if __name__ == "__main__":
    sys.exit(main())
