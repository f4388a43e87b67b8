"""Time and memory of LoRA on PaliGemma-3B on a GPU, compared with transformers and peft.

    python benchmarks/lora_3b.py [--kinds=bfloat16,int8,nf4] [--steps=40] [--text=511] [--peer] [--folder=runs/lora_3b]

Weights are random with the released sizes and scenes are synthetic, so losses have no meaning; shapes and programs are
those of `configs/clevr.py:3b`. `--text` is the number of text tokens. Times are for the last steps. Peaks are those of
the allocator, over training and an evaluation of 60 questions. XLA_PYTHON_CLIENT_MEM_FRACTION limits the memory to that
of a smaller card.

`--peer` times the same step with transformers and peft (`pip install -e ".[bench]"`), eager, with gradient
checkpointing: bfloat16 weights, float32 adapters, batch 4 in two micro-batches, AdamW; without LoRA dropout, which ours
has. Its peak is for training only.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BASES = {"bfloat16": "3b", "int8": "3b,int8", "nf4": "3b,qlora"}
OVERRIDES = {
    "model.path": "random:3b-224",
    "tokenizer": "tiny",
    "data.name": "synthetic_clevr",
    "data.fraction": 1.0,
    "data.num_train_scenes": 24,
    "data.num_validation_scenes": 6,
    "eval.max_examples": 60,
    "eval.max_new_tokens": 16,
    "total_epochs": None,
    "eval_epochs": None,
    "eval_percent": 1.0,
    "checkpoint_epochs": None,
    "checkpoint_percent": 1.0,
}
BATCH, MICRO = 4, 2  # of :3b


def main() -> None:
    """Prints a row for each base."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kinds", default=",".join(BASES), help="bases to train on: bfloat16, int8, nf4")
    parser.add_argument("--steps", type=int, default=40, help="4 or more; a quarter of them is timed")
    parser.add_argument("--text", type=int, default=511, help="text tokens, of which up to 128 or half are questions")
    parser.add_argument("--peer", action="store_true", help="also time transformers and peft")
    parser.add_argument("--folder", type=Path, default=Path("runs/lora_3b"), help="folder of the runs")
    arguments = parser.parse_args()
    kinds = [kind for kind in arguments.kinds.split(",") if kind]
    if not set(kinds) <= set(BASES):
        parser.error(f"--kinds is {arguments.kinds}, expected some of {', '.join(BASES)}")
    if arguments.steps < 4:
        parser.error(f"--steps is {arguments.steps}, expected 4 or more")
    workdirs = {kind: arguments.folder.absolute() / f"{kind}-{arguments.text}" for kind in kinds}
    existing = [str(workdir) for workdir in workdirs.values() if workdir.exists()]
    if existing:
        parser.error(f"{existing[0]} exists from an earlier call, expected a new run: remove it or change --folder")
    print("| run | seconds a step | peak memory |")
    print("|---|---|---|")
    for kind, workdir in workdirs.items():
        ours(kind, workdir, arguments.steps, arguments.text)
    if arguments.peer:
        transformers_and_peft(arguments.steps, arguments.text)


def ours(kind: str, workdir: Path, steps: int, text: int) -> None:
    """Runs train.py and prints a row of the table."""
    prefix = min(128, (text + 1) // 2)
    keys = OVERRIDES | {"total_steps": steps, "log_steps": steps // 4, "data.prefix_length": prefix}
    keys |= {"data.suffix_length": text + 1 - prefix}
    command = [sys.executable, ROOT / "train.py", f"--config={ROOT / 'configs/clevr.py'}:{BASES[kind]}"]
    command += [f"--workdir={workdir}", *(f"--config.{key}={value}" for key, value in keys.items())]
    workdir.parent.mkdir(parents=True, exist_ok=True)
    with workdir.with_suffix(".log").open("a") as file:
        subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=True)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    seconds = [1 / line["steps_per_second"] for line in lines if "steps_per_second" in line]
    peak = json.loads((workdir / "eval.json").read_text())["peak_memory_bytes"] / 2**30
    print(f"| {kind} | {seconds[-1]:.3f} | {peak:.2f} GiB |", flush=True)


def transformers_and_peft(steps: int, text: int) -> None:
    """Times the same step with transformers and peft and prints a row of the table."""
    import peft
    import torch
    import transformers

    vision = dict(model_type="siglip_vision_model", hidden_size=1152, num_hidden_layers=27, num_attention_heads=16)
    vision |= dict(patch_size=14, image_size=224, intermediate_size=4304, vision_use_head=False)
    decoder = dict(model_type="gemma", hidden_size=2048, num_hidden_layers=18, num_attention_heads=8, head_dim=256)
    decoder |= dict(num_key_value_heads=1, intermediate_size=16384, vocab_size=257216)
    config = transformers.PaliGemmaConfig(
        vision_config=vision, text_config=decoder, image_token_index=257152, projection_dim=2048, hidden_size=2048
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = transformers.PaliGemmaForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    lora = peft.LoraConfig(r=8, lora_alpha=32, target_modules=r".*language_model\..*\.(q_proj|o_proj)")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model = peft.get_peft_model(model, lora).train()
    trained = [leaf for leaf in model.parameters() if leaf.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-5)

    patches = 256
    ids = torch.randint(3, 257000, (MICRO, patches + text), device="cuda")
    ids[:, :patches] = 257152
    kinds = torch.zeros_like(ids)
    kinds[:, patches + min(127, text // 2) :] = 1
    batch = dict(
        input_ids=ids,
        token_type_ids=kinds,
        attention_mask=torch.ones_like(ids),
        labels=torch.where(kinds == 1, ids, -100),
        pixel_values=torch.randn(MICRO, 3, 224, 224, device="cuda", dtype=torch.bfloat16),
    )

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        for _ in range(BATCH // MICRO):
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(**batch).loss
            (loss * MICRO / BATCH).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps // 4):
        step()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / (steps // 4)
    peak = torch.cuda.max_memory_allocated() / 2**30
    print(f"| transformers {transformers.__version__}, peft {peft.__version__} | {seconds:.3f} | {peak:.2f} GiB |")


if __name__ == "__main__":
    main()
