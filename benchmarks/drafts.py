"""Counts the steps of greedy captions with drafts (paligemma_jax/generation/prompt_lookup.py).

    python benchmarks/drafts.py [--drafts=0,1,2,4,8] [--scenes=96] [--batch=16] [--prompt="caption en"]

The shipped tiny model answers a prompt about synthetic scenes. A batch takes the steps of its slowest row; the first
number of drafts is the one that the others are compared with. The script ends with an error if answers differ.
"""

import argparse
import time

import numpy as np

import paligemma_jax as pg
from paligemma_jax.data.synthetic_clevr import render, split_scene
from paligemma_jax.models.paligemma import PaliGemma

SIDE, NEW_TOKENS = 96, 128


def main() -> None:
    """Prints a row for each number of drafts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--drafts", default="0,1,2,4,8", help="draft_tokens of generate")
    parser.add_argument("--scenes", type=int, default=96, help="number of images")
    parser.add_argument("--batch", type=int, default=16, help="rows of a batch, a divisor of --scenes")
    parser.add_argument("--prompt", default="caption en", help="of all images")
    options = parser.parse_args()
    model, tokenizer = pg.load("tiny"), pg.load_tokenizer("tiny")
    assert isinstance(model, PaliGemma)
    prepare = model.config.preprocessing
    assert prepare is not None, "the shipped model has a preprocessing"
    scenes = (split_scene(0, "drafts", index) for index in range(options.scenes))
    batches = np.stack([prepare.apply(render(scene, SIDE, SIDE, 1)) for scene in scenes])
    batches = batches.reshape(-1, options.batch, *batches.shape[1:])
    row = pg.make_example(tokenizer, options.prompt, None, 16)
    tokens, mask = (np.repeat(row[name][None], options.batch, axis=0) for name in ("tokens", "mask_input"))

    def answer(images: np.ndarray, drafts: int, **more) -> tuple[np.ndarray, dict]:
        given = model, images, tokens, mask, NEW_TOKENS, tokenizer.eos_id
        result = pg.generate(*given, draft_tokens=drafts, **more)
        new, out = result if isinstance(result, tuple) else (result, {})
        return np.asarray(new), out

    print("| drafts | steps | times fewer | seconds |\n|---|---|---|---|")
    answers, plain = None, 0
    for drafts in map(int, options.drafts.split(",")):
        steps = sum(int(answer(images, drafts, return_out=True)[1]["steps"]) for images in batches)
        answer(batches[0], drafts)  # compiles
        began = time.perf_counter()
        new = np.concatenate([answer(images, drafts)[0] for images in batches])
        seconds, plain = time.perf_counter() - began, plain or steps
        print(f"| {drafts} | {steps} | {plain / steps:.2f} | {seconds:.2f} |", flush=True)
        if answers is not None and not np.array_equal(answers, new):
            raise SystemExit(f"answers with {drafts} drafts differ from the first ones")
        answers = new


if __name__ == "__main__":
    main()
