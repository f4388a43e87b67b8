"""The program of transformers and peft, eager, with the weights of the folder."""

import functools
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from PIL import Image

from benchmarks.peers import inputs
from benchmarks.peers.turns import Work, serve

TARGETS = r".*language_model.*\.(q_proj|o_proj)"


def load(folder: Path) -> transformers.PaliGemmaForConditionalGeneration:
    """Returns the model in float32; a generation of it never ends early."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = transformers.PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    return model.eval()


def arrays(folder: Path, model: transformers.PaliGemmaForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Returns input ids of image and text, pixels and the mask of padding, of which there is none."""
    vision, _ = inputs.sizes(folder)
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    image = torch.full((inputs.BATCH, patches), model.config.image_token_id)
    ids = torch.cat([image, torch.from_numpy(inputs.tokens()).long()], 1)
    pixels = torch.from_numpy(inputs.pixels(folder)).permute(0, 3, 1, 2).contiguous()
    return {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}


def step(folder: Path, lora: bool) -> Work:
    """Returns a training step whose loss is read."""
    model = load(folder)
    batch = arrays(folder, model)
    ids = batch["input_ids"]
    answer = torch.zeros_like(ids)
    answer[:, ids.shape[1] - inputs.TEXT + inputs.PROMPT :] = 1
    batch |= {"token_type_ids": answer, "labels": torch.where(answer == 1, ids, -100)}
    if lora:
        import peft

        options = peft.LoraConfig(r=inputs.RANK, lora_alpha=inputs.ALPHA, target_modules=TARGETS)
        model = peft.get_peft_model(model, options)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=inputs.RATE)

    def once() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return Work(once)


def generation(folder: Path, count: int) -> Work:
    """Returns the generation of `count` tokens a row; of more than one, a later token of each row."""
    model = load(folder)
    batch = arrays(folder, model)
    batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])

    @torch.no_grad()
    def generate(count: int) -> list[list[int]]:
        new = model.generate(**batch, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
        return new[:, batch["input_ids"].shape[1] :].tolist()

    if count == 1:
        return Work(lambda: generate(1))
    return Work(lambda: generate(count), lambda: generate(1), count - 1)


def evaluation(folder: Path) -> Work:
    """Returns answers to all questions, and the mean loss of their references."""
    model, processor = load(folder), transformers.AutoProcessor.from_pretrained(folder)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    rows = inputs.questions(folder)

    @torch.no_grad()
    def once() -> float:
        total = tokens = 0
        for start in range(0, len(rows), inputs.EVAL_BATCH):
            part = rows[start : start + inputs.EVAL_BATCH]
            images = [Image.open(folder / row["image"]).convert("RGB") for row in part]
            texts = ["<image>" + row["prefix"] for row in part]
            given = {"images": images, "text": texts, "return_tensors": "pt", "padding": "longest"}
            batch = processor(**given, suffix=[row["suffix"] for row in part])
            count = int((batch["labels"] != -100).sum())
            total, tokens = total + float(model(**batch).loss) * count, tokens + count
            prompts = processor(**given)
            answers = model.generate(**prompts, max_new_tokens=inputs.ANSWER_TOKENS, do_sample=False)
            processor.batch_decode(answers[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
        return total / tokens

    return Work(once)


WORKS = {
    "LoRA step": functools.partial(step, lora=True),
    "full step": functools.partial(step, lora=False),
    "first token": functools.partial(generation, count=1),
    "decoded token": functools.partial(generation, count=inputs.NEW_TOKENS),
    "evaluation": evaluation,
}

if __name__ == "__main__":
    serve(WORKS)
