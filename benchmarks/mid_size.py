"""Trains LoRA on a PaliGemma of about 40 M parameters with the base in bfloat16, int8 and NF4.

    python benchmarks/mid_size.py [--folder=runs/mid_size]

The base has random weights and is written once as a Hugging Face folder, so its loss only falls to that of guessing
from the question. Compares losses, memory and speed of the three. A complete run is not repeated.
"""

import argparse
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

from flax import nnx

from paligemma_jax.data.tokenizers.paligemma import load_tokenizer
from paligemma_jax.images.preprocessing import Preprocessing
from paligemma_jax.models.gemma import GemmaConfig
from paligemma_jax.models.paligemma import PaliGemma, PaliGemmaConfig
from paligemma_jax.models.vit import ViTConfig
from paligemma_jax.weights.hugging_face.paligemma import save_hugging_face
from train_jax.core import param_tree

ROOT = Path(__file__).resolve().parents[1]
CONFIG = PaliGemmaConfig(
    vision=ViTConfig(image_size=64, patch_size=16, width=384, depth=7, mlp_dim=1536, num_heads=6),
    decoder=GemmaConfig(vocab_size=1792, width=512, depth=7, mlp_dim=2048, num_heads=8, head_dim=64),
    preprocessing=Preprocessing.siglip(64),
)
OVERRIDES = {
    "data.num_train_scenes": 200,
    "data.num_validation_scenes": 30,
    "adapter.targets": "decoder/layers/.*_proj",
    "compute_dtype": "bfloat16",
    "model.param_dtype": "bfloat16",
    "model.unroll": False,
    "model.remat": "block",
    "optimizer.learning_rate": 3e-3,
    "eval.question_only": False,
    "eval.before": False,
}


def main() -> None:
    """Prints a row for each base."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/mid_size"), help="folder of the base and the runs")
    folder = parser.parse_args().folder.absolute()
    base = folder / "base"
    if not base.is_dir():
        print(f"{write_base(base, CONFIG) / 1e6:.1f} M parameters")
    print("| base | arguments | temporary | first loss | last loss | accuracy | steps/s | peak of the process |")
    print("|---|---|---|---|---|---|---|---|")
    for kind in ("", "int8", "nf4"):
        run(base, folder / (kind or "bfloat16"), kind)


def write_base(folder: Path, config: PaliGemmaConfig) -> int:
    """Writes a model with random weights as transformers does, with the tiny tokenizer; returns its parameters."""
    config = dataclasses.replace(config, image_token=load_tokenizer("tiny").image_id)
    model = PaliGemma(config, rngs=nnx.Rngs(0))
    save_hugging_face(model, folder, tokenizer="tiny")
    return sum(leaf.size for leaf in param_tree.flatten(model).values())


def run(base: Path, workdir: Path, kind: str) -> None:
    """Runs train.py and prints a row of the table."""
    keys = OVERRIDES | {"model.path": base, "model.quantize": kind}
    command = [sys.executable, ROOT / "train.py", f"--config={ROOT / 'configs/clevr.py'}", f"--workdir={workdir}"]
    command += [f"--config.{key}={value}" for key, value in keys.items()]
    log = workdir.with_suffix(".log")
    with log.open("a") as file:
        subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=True)
    planned = re.search(
        r"^training step, per device: .*= arguments (.*) \+ outputs.*temporary (.*)$", log.read_text(), re.M
    )
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    scores = json.loads((workdir / "eval.json").read_text())
    print(
        f"| {kind or 'bfloat16'} | {planned[1]} | {planned[2]} | {steps[0]['loss']:.3f} | {steps[-1]['loss']:.3f} | "
        f"{scores['accuracy']:.3f} | {steps[-1]['steps_per_second']:.2f} | "
        f"{scores['peak_memory_bytes'] / 2**30:.2f} GiB |",
        flush=True,
    )


if __name__ == "__main__":
    main()
