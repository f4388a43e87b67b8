"""Measures how much a model forgets when it is tuned on some families of questions (config.data.families).

    accuracy_tuned, accuracy_untuned   mean likelihood accuracy over the tuned families, and over the others
    change_tuned, change_untuned       the same minus that of the model before training
    caption_loss, caption_loss_before  nats a token of the scenes' captions, after and before training
    change_captions                    caption_loss minus caption_loss_before: positive where captions were forgotten

Every family has the same weight, however many questions it has. A number that was not evaluated is null.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from paligemma_jax.data.records import BadRow, RecordSource, Subset
from paligemma_jax.data.sources.question_families import question_family
from paligemma_jax.data.sources.scene_captions import SceneCaptions
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.tasks.vqa.answer_record import TokenLoss, question_of
from paligemma_jax.tasks.vqa.evaluation import VQAEvaluation
from paligemma_jax.tasks.vqa.rows import RowProcessor
from train_jax.core.errors import UserError


def filter_by_family(source: RecordSource, data: ConfigDict) -> Subset:
    """Returns the questions of the families that `data` names. Reads every row once; unreadable rows are kept.

    Raises:
      UserError: no question is of these families.
    """
    chosen = [index for index in range(len(source)) if _family(source, index, data.prompt) in (*data.families, None)]
    if not chosen:
        raise UserError(
            f"data.families is {tuple(data.families)!r} but none of the {len(source)} training questions is of these, "
            "expected some: choose other families."
        )
    return Subset(source, indices=chosen)


def _family(source: RecordSource, index: int, prompt: str) -> str | None:
    """Returns the family of a row; None where the row cannot be read, which is reported when it is trained on."""
    try:
        return question_family(question_of(source[index].prefix, prompt))
    except (BadRow, OSError):
        return None


def changes(tuned: Sequence[str], results: Mapping[str, Any]) -> dict[str, float | None]:
    """Returns accuracies of the tuned and of the other families and their changes, from the results of a report."""
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


def captions(
    evaluation: VQAEvaluation, source: RecordSource, initial_model: PaliGemma | None
) -> dict[str, float | None]:
    """Returns the token loss of the captions of the source's scenes, after and before training.

    Args:
      evaluation: of the trained model.
      source: questions about the scenes.
      initial_model: the model before training; None if that is not evaluated.
    """
    config = evaluation.config
    records = SceneCaptions(source, config.data.scene_seed, config.eval.captions)
    evaluation = evaluation.replace(processor=_caption_processor(evaluation.processor, records))
    after = _token_loss(evaluation, records)
    if initial_model is None:
        return {"caption_loss": after, "caption_loss_before": None, "change_captions": None}
    before = _token_loss(evaluation.replace(initial_model), records)
    return {"caption_loss": after, "caption_loss_before": before, "change_captions": after - before}


def _token_loss(evaluation: VQAEvaluation, records: SceneCaptions) -> float:
    """Returns the mean loss in nats a token."""
    loss = TokenLoss()
    for answer in evaluation.answers(records, ("loss",)):
        loss.add(answer)
    return loss.mean


def _caption_processor(processor: RowProcessor, records: SceneCaptions) -> RowProcessor:
    """Returns a processor whose rows are long enough for these texts."""
    texts, tokenizer = [records[index] for index in range(len(records))], processor.tokenizer
    data = processor.data.copy_and_resolve_references()
    with data.unlocked():
        longest_prefix = max(len(tokenizer.encode(record.prefix)) for record in texts)
        data.prefix_length = 1 + longest_prefix + len(tokenizer.separator_ids)
        data.suffix_length = 1 + max(len(tokenizer.encode(record.suffix)) for record in texts)
    return dataclasses.replace(processor, data=data)
