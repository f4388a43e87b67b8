"""The evaluation reported: accuracies, blind controls, ROUGE, the predictions one by one, and a sheet of pictures.

What each number means:

    accuracy                 share of questions whose generated answer equals the reference
    answers_without_eos      share of the generated answers that eval.max_new_tokens cut before they ended
    accuracy_likelihood      the likeliest of the candidate answers equals it: fair to a model new to the format
    accuracy_before          the same likelihood accuracy for the model before training
    accuracy_shuffled        as accuracy, every question shown the image of another scene
    accuracy_most_frequent   the most frequent training answer of the question's family
    accuracy_question_only   as accuracy, for the same fine-tuning on black images
    accuracy_blind           the best of these last three: what the questions alone are worth

A run on some families of questions (data.families), or with eval.captions, has those of forgetting.py too.

A number that has no meaning (a shuffled image where there is only one, a likelihood without candidates, the question
alone without its run) is null.
"""

import contextlib
import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from paligemma_jax.adapt.lora.adapter import detach_lora
from paligemma_jax.data.records import Source, spread
from paligemma_jax.data.sources.question_families import question_family
from paligemma_jax.metrics.text import Accuracy, RougeSums, exact_match
from paligemma_jax.tasks.vqa import forgetting
from paligemma_jax.tasks.vqa.answer import Answer, question_of
from paligemma_jax.tasks.vqa.evaluation import Evaluation, candidate_answers
from paligemma_jax.tasks.vqa.figures import save_sheet
from train_jax import loop
from train_jax.core.errors import UserError
from train_jax.core.files import to_json

MOST_TRAINING_ROWS = 20_000  # read for the most frequent answers
SHEET = 12  # scenes on the contact sheet


def report(task, model, workdir: Path, split: str, control_results: dict[str, dict] | None = None) -> dict[str, Any]:
    """Evaluates `model` on a split; writes predictions.jsonl and scenes.png; returns what eval.json holds."""
    config = task.config.eval
    source = spread(task.split(split), config.max_examples)
    evaluation = Evaluation(task, model)
    reported = split == task.default_split
    suffix = "" if reported else f"-{split}"
    frequent = MajorityBaseline(task) if config.controls else None
    answers = evaluation.answers(source, ("generate", "likelihood", "loss"))
    with _writer(workdir / f"predictions{suffix}.jsonl") as write:
        results, shown = _score(answers, write, frequent)
    results["bad_rows"] = len(source) - results["examples"]
    if frequent is not None:
        blank = (control_results or {}).get("question_only")
        if blank is None or blank["examples"] != results["examples"]:
            blank = _question_only(task, workdir, None if reported else split)
        controls = {
            "accuracy_shuffled": _shuffled(evaluation, source),
            "accuracy_most_frequent": frequent.accuracy,
            "accuracy_question_only": blank,
        }
        results |= _best_of(controls)
    before = _untrained(task, model) if config.before else None
    if before is not None:
        results |= _before(task, before, source)
    if config.captions and reported:
        results |= forgetting.captions(task, source, model, before)
    if task.config.data.families:
        results |= forgetting.changes(task.config.data.families, results)
    if jax.process_index() == 0:
        # CLEVR's view is 3:2, also where its pictures are stored as squares.
        ratio = 1.5 if task.config.data.name in ("synthetic_clevr", "clevr") else None
        save_sheet(source, shown, workdir / f"scenes{suffix}.png", view_ratio=ratio)
    return results


def _score(
    answers: Iterable[Answer], write, frequent: "MajorityBaseline | None"
) -> tuple[dict[str, Any], list[Answer]]:
    """Sums over all answers in constant memory; the first answer of each of the first scenes is kept for the sheet."""
    generated, likely, rouge = Accuracy(), Accuracy(), RougeSums()
    nll, tokens, endless, shown = 0.0, 0.0, 0, {}
    for answer in answers:
        generated.add(exact_match(answer.prediction, answer.reference), answer.family)
        if frequent is not None:
            frequent.add(answer)
        rouge.add(answer.prediction, answer.reference)
        if answer.likeliest is not None:
            likely.add(exact_match(answer.likeliest, answer.reference), answer.family)
        nll, tokens, endless = nll + answer.nll, tokens + answer.tokens, endless + (answer.ended is False)
        if len(shown) < SHEET:
            shown.setdefault(answer.image, answer)
        write(answer)
    results = {
        "examples": generated.examples,
        "loss": nll / max(tokens, 1.0),
        "accuracy": generated.overall,
        "answers_without_eos": endless / max(generated.examples, 1),
        "accuracy_likelihood": likely.overall if likely.examples else None,
        "accuracy_by_family": generated.by_family(),
        "accuracy_likelihood_by_family": likely.by_family(),
        "examples_by_family": dict(sorted(generated.total.items())),
    }
    scores = rouge.result()
    results |= {name: score["f1"] for name, score in scores.items()} | {"rouge": scores}
    return results, list(shown.values())


class MajorityBaseline:
    """The blind control that gives every question the most frequent training answer of its family."""

    def __init__(self, task):
        """Counts the answers of the training rows."""
        counts: dict[str, Counter] = defaultdict(Counter)
        train = task.split("train")
        for index in range(min(len(train), MOST_TRAINING_ROWS)):
            try:
                record = train[index]
            except (UserError, OSError):  # as GuardedSource says of bad rows, which train nothing
                continue
            counts[question_family(question_of(record.prefix, task.config.data.prompt))][record.suffix] += 1
        self.guesses = {family: answers.most_common(1)[0][0] for family, answers in counts.items()}
        self.accuracy = Accuracy()

    def add(self, answer: Answer) -> None:
        """Compares the guess with the answer's reference; a family that never trained has no guess."""
        self.accuracy.add(exact_match(self.guesses.get(answer.family, ""), answer.reference), answer.family)


def _shuffled(evaluation: Evaluation, source: Source) -> Accuracy | None:
    """The model's accuracy where every question is shown another's image; None where there is only one image."""
    if len(np.unique(source.image_numbers())) < 2:
        return None
    accuracy = Accuracy()
    for answer in evaluation.answers(source, ("generate",), shuffled=True):
        accuracy.add(exact_match(answer.prediction, answer.reference), answer.family)
    return accuracy


def _question_only(task, workdir: Path, split: str | None) -> dict[str, Any] | None:
    """Evaluates the run on black images that lies in the workdir; None where there is none."""
    config, folder = task.control_runs().get("question_only"), workdir / "question_only"
    if config is None or not (folder / "checkpoints").is_dir():
        return None
    return loop.evaluate(config, folder, split)


def _best_of(controls: dict[str, Accuracy | dict | None]) -> dict[str, Any]:
    """Every control by its own name and by family, and the best of them."""
    overall: dict[str, float | None] = dict.fromkeys(controls)
    families = {}
    for name, found in controls.items():
        if isinstance(found, Accuracy):
            overall[name], families[name] = found.overall, found.by_family()
        elif found is not None:
            overall[name], families[name] = found["accuracy"], found["accuracy_by_family"]
    best = max(value for value in overall.values() if value is not None)
    return {"accuracy_blind": best} | overall | {"controls_by_family": families}


def _before(task, untrained, source) -> dict[str, Any]:
    """Accuracy of the model before training, by likelihood, and by family."""
    if not candidate_answers(task.config.eval.candidates):
        return {"accuracy_before": None}
    accuracy = Accuracy()
    for answer in Evaluation(task, untrained).answers(source, ("likelihood",)):
        accuracy.add(exact_match(answer.likeliest, answer.reference), answer.family)
    return {"accuracy_before": accuracy.overall, "accuracy_before_by_family": accuracy.by_family()}


def _untrained(task, model):
    """The model as it was: without its adapters, or with those that the run went on from, sharing every frozen array;
    read again where a part of the base trained."""
    if task.config.adapter.name == "lora":
        base = detach_lora(nnx.clone(model))
        return base if task.config.adapter.path is None else task.attach(base)
    return task.base()


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
            out.write(to_json(row | {"correct": exact_match(answer.prediction, answer.reference)}) + "\n")

        yield write
    beside.replace(file)
