"""The reported evaluation: accuracies, blind controls, ROUGE, a file of predictions, and a figure of some answers.

The numbers:

    accuracy                 share of questions whose generated answer equals the reference
    answers_without_eos      share of the generated answers that eval.max_new_tokens cut before they ended
    accuracy_likelihood      share whose likeliest candidate equals the reference: fair to a model new to the format
    accuracy_before          accuracy_likelihood of the model before training
    accuracy_shuffled        accuracy where every question is shown the image of another scene
    accuracy_most_frequent   accuracy of the most frequent training answer of the question's family
    accuracy_question_only   accuracy of the same fine-tuning on black images
    accuracy_blind           the largest of the last three: the accuracy that needs no image

A run on some families of questions (data.families), or with eval.captions, also has the numbers of forgetting.py.

A number without a meaning is null: accuracy_shuffled with a single image, a likelihood without candidates,
accuracy_question_only without its run.
"""

import contextlib
import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from paligemma_jax.data.records import RecordSource
from paligemma_jax.data.sources.question_families import question_family
from paligemma_jax.metrics.text import Accuracy, RougeSums, exact_match
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.tasks.vqa import forgetting
from paligemma_jax.tasks.vqa.answer_record import Answer, TokenLoss, question_of
from paligemma_jax.tasks.vqa.evaluation import VQAEvaluation, candidate_answers
from train_jax import loop
from train_jax.core.errors import UserError
from train_jax.core.files import atomic, to_json

MOST_TRAINING_ROWS = 20_000  # read for the most frequent answers
SHOWN = 12  # scenes of the figure


def report(
    evaluation: VQAEvaluation,
    source: RecordSource,
    workdir: Path,
    *,
    split: str | None,
    training: RecordSource | None,
    initial_model: Callable[[], PaliGemma],
    question_only: ConfigDict | None,
    control_results: Mapping[str, Mapping[str, Any]] | None,
) -> dict[str, Any]:
    """Evaluates a model on a source; writes predictions.jsonl and scenes.png; returns the contents of eval.json.

    Args:
      evaluation: of the trained model.
      source: the records to answer.
      workdir: of the run.
      split: a name for the files; None for the split that the run reports.
      training: the training records, for the most frequent answers; read under eval.controls.
      initial_model: returns the model before training; called under eval.before, after the trained model was evaluated.
      question_only: config of the control run on black images; None if the run has none.
      control_results: results of control runs by name.
    """
    config, suffix = evaluation.config, "" if split is None else f"-{split}"
    majority = None if training is None else MajorityBaseline(training, config.data.prompt)
    answers = evaluation.answers(source, ("generate", "likelihood", "loss"))
    with _writer(workdir / f"predictions{suffix}.jsonl") as write:
        results, shown = _score(answers, write, majority)
    results["bad_rows"] = len(source) - results["examples"]
    if majority is not None:
        blank = (control_results or {}).get("question_only")
        if blank is None or blank["examples"] != results["examples"]:
            blank = _evaluate_control(question_only, workdir / "question_only", split)
        controls = {
            "accuracy_shuffled": _shuffled(evaluation, source),
            "accuracy_most_frequent": majority.accuracy,
            "accuracy_question_only": blank,
        }
        results |= _best_control(controls)
    before = initial_model() if config.eval.before else None
    if before is not None:
        results |= _before(evaluation.replace(before), source)
    if config.eval.captions and split is None:
        results |= forgetting.captions(evaluation, source, before)
    if config.data.families:
        results |= forgetting.changes(config.data.families, results)
    if jax.process_index() == 0:
        from paligemma_jax.tasks.vqa.figures import save_answer_sheet  # slow to import: matplotlib

        # CLEVR's view is 3:2, even where its images are stored as squares.
        ratio = 1.5 if config.data.name in ("synthetic_clevr", "clevr") else None
        save_answer_sheet(source, shown, workdir / f"scenes{suffix}.png", view_ratio=ratio)
    return results


def _score(
    answers: Iterable[Answer], write: Callable[[Answer], None], majority: "MajorityBaseline | None"
) -> tuple[dict[str, Any], list[Answer]]:
    """Sums over all answers in constant memory; also returns the first answer of each of the first scenes."""
    generated, likely, rouge, loss = Accuracy(), Accuracy(), RougeSums(), TokenLoss()
    unended, shown = 0, {}
    for answer in answers:
        generated.add(answer.correct, answer.family)
        if majority is not None:
            majority.add(answer)
        rouge.add(answer.prediction or "", answer.reference)
        if answer.likeliest is not None:
            likely.add(answer.likeliest_correct, answer.family)
        loss.add(answer)
        unended += answer.ended is False
        if len(shown) < SHOWN:
            shown.setdefault(answer.image, answer)
        write(answer)
    results = {
        "examples": generated.examples,
        "loss": loss.mean,
        "accuracy": generated.overall,
        "answers_without_eos": unended / max(generated.examples, 1),
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

    def __init__(self, training: RecordSource, prompt: str):
        """Counts the answers of the training records.

        Args:
          training: the records; the first MOST_TRAINING_ROWS are read.
          prompt: the template of their prefixes.
        """
        counts: dict[str, Counter] = defaultdict(Counter)
        for index in range(min(len(training), MOST_TRAINING_ROWS)):
            with contextlib.suppress(UserError, OSError):  # bad rows, see GuardedSource: they are not trained on
                record = training[index]
                counts[question_family(question_of(record.prefix, prompt))][record.suffix] += 1
        self.guesses = {family: answers.most_common(1)[0][0] for family, answers in counts.items()}
        self.accuracy = Accuracy()

    def add(self, answer: Answer) -> None:
        """Compares the guess with the answer's reference; a family without training rows has no guess."""
        self.accuracy.add(exact_match(self.guesses.get(answer.family, ""), answer.reference), answer.family)


def _shuffled(evaluation: VQAEvaluation, source: RecordSource) -> Accuracy | None:
    """Returns the accuracy where every question is shown another image; None if there is only one image."""
    if len(np.unique(source.image_numbers())) < 2:
        return None
    accuracy = Accuracy()
    for answer in evaluation.answers(source, ("generate",), shuffled=True):
        accuracy.add(answer.correct, answer.family)
    return accuracy


def _evaluate_control(config: ConfigDict | None, workdir: Path, split: str | None) -> dict[str, Any] | None:
    """Evaluates a control run; None where it was not trained."""
    if config is None or not (workdir / "checkpoints").is_dir():
        return None
    return loop.evaluate(config, workdir, split)


def _best_control(controls: Mapping[str, Accuracy | Mapping[str, Any] | None]) -> dict[str, Any]:
    """Returns the accuracy of every control, also by family, and the largest of them as `accuracy_blind`."""
    overall: dict[str, float | None] = dict.fromkeys(controls)
    families = {}
    for name, control in controls.items():
        if isinstance(control, Accuracy):
            overall[name], families[name] = control.overall, control.by_family()
        elif control is not None:
            overall[name], families[name] = control["accuracy"], control["accuracy_by_family"]
    best = max(value for value in overall.values() if value is not None)
    return {"accuracy_blind": best} | overall | {"controls_by_family": families}


def _before(evaluation: VQAEvaluation, source: RecordSource) -> dict[str, Any]:
    """Returns the likelihood accuracy of the model before training, overall and by family."""
    if not candidate_answers(evaluation.config.eval.candidates):
        return {"accuracy_before": None}
    accuracy = Accuracy()
    for answer in evaluation.answers(source, ("likelihood",)):
        accuracy.add(answer.likeliest_correct, answer.family)
    return {"accuracy_before": accuracy.overall, "accuracy_before_by_family": accuracy.by_family()}


@contextlib.contextmanager
def _writer(file: Path) -> Iterator[Callable[[Answer], None]]:
    """Yields a function that appends an answer to a JSONL file; only the primary process writes.

    The file gets its name when it is complete.
    """
    if jax.process_index() != 0:
        yield lambda answer: None
        return
    with atomic(file) as draft, draft.open("w", encoding="utf-8") as out:

        def write(answer: Answer) -> None:
            out.write(to_json(dataclasses.asdict(answer) | {"correct": answer.correct}) + "\n")

        yield write
