"""What a model forgets that is tuned on some families of questions (config.data.families): numbers of the report.

    accuracy_tuned, accuracy_untuned   mean over the tuned families, and over the others, of the accuracy by likelihood
    change_tuned, change_untuned       these less the same of the model before training
    caption_loss, caption_loss_before  nats a token of the scenes' captions, after and before training
    change_captions                    caption_loss less caption_loss_before: positive where captions were forgotten

Families weigh the same, however many questions they have. A number that needs what was not evaluated is null.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from paligemma_jax.data.records import BadRow, Source, Subset
from paligemma_jax.data.sources.question_families import question_family
from paligemma_jax.data.sources.scene_captions import SceneCaptions
from paligemma_jax.tasks.vqa.answer import question_of
from paligemma_jax.tasks.vqa.rows import Rows
from train_jax.core.errors import UserError


def filter_by_family(source: Source, data: ConfigDict) -> Subset:
    """The questions of the families that `data` names; every row is read once. Rows that cannot be read stay.

    Raises:
      UserError: there is none.
    """
    chosen = [index for index in range(len(source)) if _family(source, index, data.prompt) in (*data.families, None)]
    if not chosen:
        raise UserError(
            f"data.families is {tuple(data.families)!r} but none of the {len(source)} training questions is of these, "
            "expected some: choose other families."
        )
    return Subset(source, indices=chosen)


def _family(source: Source, index: int, prompt: str) -> str | None:
    """Of a row, None where it cannot be read: its fault is told where it would train."""
    try:
        return question_family(question_of(source[index].prefix, prompt))
    except (BadRow, OSError):
        return None


def changes(tuned: Sequence[str], results: Mapping[str, Any]) -> dict[str, float | None]:
    """Accuracies of tuned and of other families, and how they changed, from what a report holds."""
    out: dict[str, float | None] = {}
    after, before = (results.get(f"accuracy_{name}_by_family") or {} for name in ("likelihood", "before"))
    for name, chosen in (("tuned", True), ("untuned", False)):
        families = [family for family in after if (family in tuned) is chosen]
        out[f"accuracy_{name}"] = _mean([after[family] for family in families])
        gains = [after[family] - before[family] for family in families if family in before]
        out[f"change_{name}"] = _mean(gains)
    return out


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def captions(task, source: Source, model, before) -> dict[str, float | None]:
    """Token loss of the captions of the source's scenes under both models; `before` may be None."""
    records = SceneCaptions(source, task.config.data.scene_seed, task.config.eval.captions)
    after, first = (None if each is None else _token_loss(task, each, records) for each in (model, before))
    change = None if first is None else after - first
    return {"caption_loss": after, "caption_loss_before": first, "change_captions": change}


def _token_loss(task, model, records: SceneCaptions) -> float:
    """Nats a token."""
    from paligemma_jax.tasks.vqa.evaluation import Evaluation  # which imports what the task needs to start

    answers = list(Evaluation(task, model, _caption_rows(task, records)).answers(records, ("loss",)))
    return sum(answer.nll for answer in answers) / sum(answer.tokens for answer in answers)


def _caption_rows(task, records: SceneCaptions) -> Rows:
    """Prepares rows as the task's do, long enough for these texts."""
    texts = [records[index] for index in range(len(records))]
    lengths = [
        1 + int(np.max([len(task.tokenizer.encode(getattr(record, part))) for record in texts]))
        for part in ("prefix", "suffix")
    ]
    data = task.config.data.copy_and_resolve_references()
    with data.unlocked():
        data.prefix_length = lengths[0] + len(task.tokenizer.separator_ids)
        data.suffix_length = lengths[1]
    return Rows(task.tokenizer, task.rows.preprocessing, data)
