"""The evaluation reported: accuracies, blind controls, ROUGE, the predictions one by one, and a sheet of pictures.

What each number means:

    accuracy                 share of questions whose generated answer equals the reference
    accuracy_likelihood      the likeliest of the candidate answers equals it: fair to a model new to the format
    accuracy_before          the same likelihood accuracy for the model before training
    accuracy_shuffled        as accuracy, every question shown the image of another scene
    accuracy_most_frequent   the most frequent training answer of the question's family
    accuracy_question_only   as accuracy, for the same fine-tuning on black images
    accuracy_blind           the best of these last three: what the questions alone are worth
"""

import contextlib
import dataclasses
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from paligemma_jax.adapt.lora import detach_lora
from paligemma_jax.data.families import question_family
from paligemma_jax.data.records import Subset
from paligemma_jax.metrics import Accuracy, RougeSums, exact_match
from paligemma_jax.tasks.vqa_answer import Answer, question_of
from paligemma_jax.tasks.vqa_evaluation import Evaluation
from paligemma_jax.tasks.vqa_pictures import save_sheet

CONTROLS = ("accuracy_shuffled", "accuracy_most_frequent", "accuracy_question_only")
MOST_TRAINING_ROWS = 20_000  # read for the most frequent answers
SHEET = 12  # scenes on the contact sheet


def report(task, model, workdir: Path, split: str, companions: dict[str, dict] | None = None) -> dict[str, Any]:
    """Evaluates `model` on a split; writes predictions.jsonl and scenes.png; returns what eval.json holds."""
    config, source = task.config.eval, task.split(split)
    if config.max_examples is not None and config.max_examples < len(source):
        source = Subset(source, indices=range(config.max_examples))
    evaluation = Evaluation(task, model)
    file = workdir / (
        "predictions.jsonl" if split == task.config.data.validation_split else f"predictions-{split}.jsonl"
    )
    answers = evaluation.answers(source, ("generate", "likelihood", "loss"))
    with _writer(file) as write:
        results, shown = _score(answers, write)
    if config.controls:
        results |= _controls(task, evaluation, source, companions or {})
    if config.before:
        results |= _before(task, model, source)
    if jax.process_index() == 0:
        # CLEVR's view is 3:2, also where its pictures are stored as squares.
        ratio = 1.5 if task.config.data.name in ("synthetic_clevr", "clevr") else None
        save_sheet(source, shown, workdir / "scenes.png", view_ratio=ratio)
    return results


def _score(answers: Iterable[Answer], write) -> tuple[dict[str, Any], list[Answer]]:
    """Sums over all answers in constant memory; the first answer of each of the first scenes is kept for the sheet."""
    generated, likely, rouge = Accuracy(), Accuracy(), RougeSums()
    nll, tokens, shown = 0.0, 0.0, {}
    for answer in answers:
        generated.add(exact_match(answer.prediction, answer.reference), answer.family)
        rouge.add(answer.prediction, answer.reference)
        if answer.likeliest is not None:
            likely.add(exact_match(answer.likeliest, answer.reference), answer.family)
        nll, tokens = nll + answer.nll, tokens + answer.tokens
        if len(shown) < SHEET:
            shown.setdefault(answer.image_name, answer)
        write(answer)
    results = {
        "examples": generated.examples,
        "loss": nll / max(tokens, 1.0),
        "accuracy": generated.overall,
        "accuracy_likelihood": likely.overall if likely.examples else None,
        "accuracy_by_family": generated.by_family(),
        "examples_by_family": dict(sorted(generated.total.items())),
    }
    scores = rouge.result() if rouge.pairs else {}
    return results | {name: score["f1"] for name, score in scores.items()}, list(shown.values())


def _controls(task, evaluation: Evaluation, source, companions: dict[str, dict]) -> dict[str, Any]:
    """The blind controls, each by its own name and by family, and the best of them."""
    shuffled, frequent, guesses = Accuracy(), Accuracy(), _most_frequent(task)
    for answer in evaluation.answers(source, ("generate",), shuffled=True):
        shuffled.add(exact_match(answer.prediction, answer.reference), answer.family)
        frequent.add(exact_match(guesses.get(answer.family, ""), answer.reference), answer.family)
    results = {"accuracy_shuffled": shuffled.overall, "accuracy_most_frequent": frequent.overall}
    families = {"accuracy_shuffled": shuffled.by_family(), "accuracy_most_frequent": frequent.by_family()}
    blank = companions.get("question_only")
    if blank is not None:
        results["accuracy_question_only"] = blank["accuracy"]
        families["accuracy_question_only"] = blank["accuracy_by_family"]
    return {"accuracy_blind": max(results.values())} | results | {"controls_by_family": families}


def _most_frequent(task) -> dict[str, str]:
    """The most frequent training answer of every family."""
    counts: dict[str, Counter] = defaultdict(Counter)
    train = task.split("train")
    for index in range(min(len(train), MOST_TRAINING_ROWS)):
        with contextlib.suppress(ValueError, OSError):  # bad rows train nothing
            record = train[index]
            counts[question_family(question_of(record.prefix, task.config.data.prompt))][record.suffix] += 1
    return {family: answers.most_common(1)[0][0] for family, answers in counts.items()}


def _before(task, model, source) -> dict[str, Any]:
    """Accuracy of the model before training, by likelihood, and by family."""
    accuracy = Accuracy()
    before = Evaluation(task, _untrained(task, model))
    for answer in before.answers(source, ("likelihood",)):
        if answer.likeliest is None:
            return {"accuracy_before": None}
        accuracy.add(exact_match(answer.likeliest, answer.reference), answer.family)
    return {"accuracy_before": accuracy.overall, "accuracy_before_by_family": accuracy.by_family()}


def _untrained(task, model):
    """The model as it was: without its adapters (sharing every frozen array), or read again if the base trained."""
    if task.config.adapter.name == "lora":
        return detach_lora(nnx.clone(model))
    return task.init()


@contextlib.contextmanager
def _writer(file: Path) -> Iterator:
    """Appends answers to a JSONL file that takes its name when it is complete; only the primary process writes."""
    if jax.process_index() != 0:
        yield lambda answer: None
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.tmp")
    with open(beside, "w", encoding="utf-8") as out:

        def write(answer: Answer) -> None:
            row = dataclasses.asdict(answer)
            out.write(json.dumps(row | {"correct": exact_match(answer.prediction, answer.reference)}) + "\n")

        yield write
    beside.replace(file)
