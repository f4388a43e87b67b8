"""Answers questions batch by batch, in memory that depends neither on their number nor on the batch asked for.

What training keeps whole and runs out of memory with (logits of every token over 257,152 words) is never made here:
answers are generated with a cache, likelihoods and losses are computed in chunks, and of each batch only ids and sums
survive. The batch starts as large as the config allows, or as the compiled step says the device can hold, and halves
whenever the device runs out all the same.
"""

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from paligemma_jax.adapt.quantization.quantize import set_outlier_split
from paligemma_jax.data.prompts import encode
from paligemma_jax.data.records import BadRow, Record, Source, blank_record
from paligemma_jax.data.sources.question_families import question_family
from paligemma_jax.data.synthetic_clevr.attributes import ANSWERS
from paligemma_jax.generation.candidate_scoring import score_candidates
from paligemma_jax.generation.generate import generate
from paligemma_jax.metrics.text import Accuracy, exact_match
from paligemma_jax.tasks import common
from paligemma_jax.tasks.vqa.answer import Answer, question_of
from paligemma_jax.tasks.vqa.features import FeatureCache, encode_images, encoder, feature_shape
from paligemma_jax.tasks.vqa.rows import Rows
from train_jax.core import param_tree
from train_jax.core.errors import UserError, cut
from train_jax.parallel import sharding
from train_jax.system.memory import device_memory_limit, smaller_batch, step_memory

OUTPUTS = ("generate", "likelihood", "loss")


def candidate_answers(candidates: str) -> tuple[str, ...]:
    """The answers of config.eval.candidates."""
    return ANSWERS if candidates == "clevr" else tuple(filter(None, candidates.split("|")))


def rows_at_once(config: ConfigDict, mesh: Mesh) -> int:
    """Rows of a batch at the start of an evaluation: `eval.batch_size`, as a multiple of the mesh's row parts."""
    parts = common.row_parts(mesh)
    return max(config.eval.batch_size // parts, 1) * parts


class Evaluation:
    """One model over any number of sources."""

    def __init__(self, task, model, rows: Rows | None = None):
        """`rows` prepares the records, the task's own when None."""
        self.task, self.config, self._rows = task, task.config, rows or task.rows
        outliers = self.config.eval.int8_outliers
        # A clone holds the same arrays: training goes on with dequantised weights.
        self.model = model if outliers is None else set_outlier_split(nnx.clone(model), outliers)
        self._parts = common.row_parts(task.mesh)
        self._size = rows_at_once(self.config, task.mesh)
        self._fitted = False
        self._candidates = self._tokenize_candidates()

    def summary(self, source: Source, wanted: tuple[str, ...]) -> dict[str, float]:
        """Accuracy and token loss of a source, for the course of training."""
        accuracy, nll, tokens = Accuracy(), 0.0, 0.0
        for answer in self.answers(source, wanted):
            accuracy.add(exact_match(answer.prediction, answer.reference))
            nll, tokens = nll + answer.nll, tokens + answer.tokens
        return {"accuracy": accuracy.overall, "loss": nll / max(tokens, 1.0), "examples": accuracy.examples}

    def answers(self, source: Source, wanted: tuple[str, ...], shuffled: bool = False) -> Iterator[Answer]:
        """Answers the good rows of a source, in order.

        Args:
          source: the records; those that cannot be read or do not fit are left out, as the config's policy says.
          wanted: what to compute, of OUTPUTS.
          shuffled: show each question the image of another scene (all questions of an image the same one).

        Raises:
          UserError: too many bad rows, no good one, or a device too small for a single question.
        """
        good = 0
        self._size = min(self._size, -(-len(source) // self._parts) * self._parts)  # a split may be smaller
        encode = encoder(self.model, self.task.mesh)
        with _Reader(self.config, self._rows, source, encode, self._size, shuffled) as reader:
            self._fit(reader, wanted)
            start = 0
            while start < len(source):
                rows = range(start, min(start + self._size, len(source)))
                try:
                    found = self._batch(reader, rows, wanted)
                except jax.errors.JaxRuntimeError as error:
                    self._shrink(error)
                    reader.resize(self._size)
                    continue
                start, good = start + len(rows), good + len(found)
                yield from found
            reader.check()
        if not good:
            raise UserError(f"none of the {len(source)} rows to evaluate can be used: mend the data.")

    def _batch(self, reader: "_Reader", rows: range, wanted: tuple[str, ...]) -> list[Answer]:
        """Reads, computes, and turns one batch into answers."""
        records, arrays = reader.read(rows, self._size)
        out = self._compute(arrays, wanted)
        answers = []
        for i, record in enumerate(records):
            if arrays["weight"][i] == 0:
                continue
            question = question_of(record.prefix, self.config.data.prompt)
            values: dict[str, Any] = {}
            if "generate" in out:
                ids = out["generate"][i].tolist()
                values |= {
                    "prediction": self.task.tokenizer.decode(ids),
                    "ended": self.task.tokenizer.eos_id in ids,
                }
            if "likelihood" in out:
                values["likeliest"] = self._candidates[0][int(out["likelihood"][i].argmax())]
            if "loss" in out:
                values |= {"nll": float(out["loss"][0][i]), "tokens": float(out["loss"][1][i])}
            values["image_index"] = record.image_index
            answers.append(Answer(record.image_name, question, question_family(question), record.suffix, **values))
        return answers

    def _compute(self, arrays: dict[str, np.ndarray], wanted: tuple[str, ...]) -> dict[str, Any]:
        """Device results of one batch, on the host."""
        batch = common.to_mesh(arrays, self.task.mesh)
        out = {name: program(self.model, batch) for name, program in self.programs(wanted).items()}
        return jax.tree.map(sharding.to_host, out)

    def programs(self, wanted: tuple[str, ...] = OUTPUTS) -> dict[str, Callable]:
        """What of OUTPUTS is wanted and can be had, each a function of the model and a batch on the mesh."""
        found: dict[str, Callable] = {"generate": self._generate, "loss": functools.partial(_token_loss, self.task)}
        if self._candidates is not None:
            found["likelihood"] = self._score
        return {name: found[name] for name in OUTPUTS if name in wanted and name in found}

    def _generate(self, model, batch) -> jax.Array:
        return generate(
            model,
            None,
            batch["prompt"],
            batch["prompt_mask"],
            self.config.eval.max_new_tokens,
            self.task.tokenizer.eos_id,
            image_features=batch["features"],
        )

    def _score(self, model, batch) -> jax.Array:
        _, ids, mask = self._candidates
        chunks = self.config.loss.chunk_size, self.config.loss.vocab_chunk
        return score_candidates(model, batch["features"], batch["prompt"], batch["prompt_mask"], ids, mask, *chunks)

    # Memory.

    def _fit(self, reader: "_Reader", wanted: tuple[str, ...]) -> None:
        """Halves the batch until the compiled step fits what the device has left (where it tells)."""
        limit = _free_memory()
        while limit is not None and not self._fitted and self._size > self._parts:
            if self._all_activations() <= limit:  # spares the compiler, which takes half a minute on a CPU
                break
            most = need = self._need(*self._shapes(reader), wanted)
            if need is None or need <= limit:
                break
            while need > limit and self._size > self._parts:  # about in proportion to the rows; compiled again to know
                self._size, need = max(self._size // 2 // self._parts, 1) * self._parts, need // 2
            logging.warning(
                "Evaluation goes on with %d questions at once: more need %d bytes beside the model, %d are free.",
                self._size, most, limit,
            )  # fmt: skip
        self._fitted = True
        reader.resize(self._size)

    def _need(self, batch, images, wanted: tuple[str, ...]) -> int | None:
        """Bytes that a batch of these shapes takes beside the model, as the compiler says; None where it does not.

        Evaluations of one run ask again and again, and are told what the first was.
        """
        key = wanted, str((batch, images)), str(param_tree.abstract(self.model))
        if key not in self.task.evaluation_bytes:
            step = jax.jit(self._everything, static_argnums=3).lower(self.model, batch, images, wanted).compile()
            memory = step_memory(step)
            self.task.evaluation_bytes[key] = None if memory is None else memory.temp + memory.output
        return self.task.evaluation_bytes[key]

    def _all_activations(self) -> int:
        """More bytes than a device needs for its rows: as if of no layer anything were freed, and all in float32."""
        config, data, model = self.config, self._rows.data, self.model.config
        vision, decoder = model.vision, model.decoder
        candidates = 0 if self._candidates is None else self._candidates[1].size
        tokens = data.prefix_length + max(data.suffix_length, config.eval.max_new_tokens, candidates)

        def layers(tower, length, projected) -> int:  # residual stream, projections, scores, feed-forward
            wide = 8 * tower.width + 4 * projected + 4 * tower.mlp_dim
            return tower.depth * length * (wide + 3 * tower.num_heads * length)

        row = layers(vision, vision.num_patches, vision.width)
        row += layers(decoder, vision.num_patches + tokens, decoder.num_heads * decoder.head_dim)
        row += 4 * decoder.vocab_size + 4 * tokens * decoder.width + 6 * vision.image_size**2
        logits = 4 * config.loss.chunk_size * decoder.vocab_size
        return 4 * (self._size // self._parts * row + logits)

    def _shapes(self, reader: "_Reader"):
        """A batch and its images as shapes on the mesh."""
        rows = sharding.batch_sharding(self.task.mesh, accumulate=False)

        def shape(array) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((self._size, *array.shape), array.dtype, sharding=rows)

        example = reader.blank()
        images = shape(example.pop("image"))
        example["features"] = jax.ShapeDtypeStruct(feature_shape(self.model), np.float32)
        return {name: shape(array) for name, array in example.items()}, images

    def _everything(self, model, batch, images, wanted: tuple[str, ...]):
        """All of a batch's computations in one program, to ask the compiler what they take."""
        return [encode_images(model, images), *(run(model, batch) for run in self.programs(wanted).values())]

    def _shrink(self, error: Exception) -> None:
        """Halves the batch after the device ran out of memory; raises as `smaller_batch`."""
        remedy = "use a device with more, lower data.prefix_length or eval.max_new_tokens, or a smaller compute_dtype"
        self._size = smaller_batch(error, self._size, self._parts, "eval.batch_size", remedy)
        logging.warning("Evaluation goes on with %d questions at once: the device ran out of memory.", self._size)

    def _tokenize_candidates(self):
        """The candidates as texts, ids [C, M] and mask [C, M], each with its EOS; None without candidates."""
        answers = candidate_answers(self.config.eval.candidates)
        if not answers:
            return None
        tokenizer = self.task.tokenizer
        special = self.config.data.get("special_tokens", "refuse")
        rows = [[*encode(tokenizer, answer, special), tokenizer.eos_id] for answer in answers]
        ids = np.full((len(rows), max(map(len, rows))), tokenizer.pad_id, np.int32)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
        mask = np.arange(ids.shape[1])[None] < np.array([len(row) for row in rows])[:, None]
        return answers, jnp.asarray(ids), jnp.asarray(mask)


class _Reader:
    """Reads rows of a source as prompts, targets and features, bad ones with weight 0. A context: it has threads."""

    def __init__(self, config: ConfigDict, rows: Rows, source: Source, encode, size: int, shuffled: bool):
        self._config, self._make = config, rows
        self._rows = rows.guarded(source, self._prepare)
        # Shares are judged by row, in `_rows`: an image may have one question or many.
        self._images = rows.guarded(source, rows.image, max_bad_fraction=1.0)
        self._numbers = np.asarray(source.image_numbers())
        unique, first = np.unique(self._numbers, return_index=True)
        self._row_of = dict(zip(unique.tolist(), first.tolist(), strict=True))
        self._shown = other_images(unique) if shuffled else {number: number for number in self._row_of}
        self._unusable: set[int] = set()
        self._encode, self._pool = encode, ThreadPoolExecutor(2)
        self.resize(size)

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, *error) -> None:
        self._pool.shutdown(wait=False)

    def resize(self, size: int) -> None:
        """Another number of rows at once."""
        megabytes = self._config.eval.feature_cache_mb if jax.process_count() == 1 else 0
        self._cache = FeatureCache(self._encode, size, megabytes << 20)

    def check(self) -> None:
        """Judges the share of bad rows."""
        self._rows.check()

    def blank(self) -> dict[str, np.ndarray]:
        """The arrays of a row that holds nothing, with its `image`."""
        record = blank_record()
        example = self._prepare(record) | self._make.image(record) | {"weight": np.float32(0)}
        return {name: value for name, value in example.items() if name != "record"}

    def _prepare(self, record: Record) -> dict[str, Any]:
        if record.weight and self._shown[record.image_index] in self._unusable:
            raise BadRow(f"the image for {cut(record.image_name)} cannot be used; replace the file.")
        return {"record": record} | self._make.prompt_and_text(record)

    def read(self, rows: range, size: int) -> tuple[list[Record], dict[str, np.ndarray]]:
        """Records and arrays of some rows, filled up to `size` rows with copies of weight 0."""
        keys = [self._shown[int(self._numbers[i])] for i in rows]
        features = self._cache.get(keys, self._fetch)
        examples = [self._rows[i] for i in rows]  # after the images: rows without a usable one are bad
        records = [example.pop("record") for example in examples]
        batch = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
        self._rows.on_rows(rows, batch.pop("bad"))
        batch["features"] = features
        missing = size - len(rows)
        batch = {name: np.concatenate([array, np.repeat(array[:1], missing, 0)]) for name, array in batch.items()}
        batch["weight"][len(rows) :] = 0
        return records, batch

    def _fetch(self, keys: list[int]) -> list[np.ndarray]:
        """The images with these numbers, decoded in threads."""
        rows = list(self._pool.map(lambda key: self._images[self._row_of[key]], keys))
        self._unusable |= {key for key, row in zip(keys, rows, strict=True) if row["weight"] == 0}
        return [row["image"] for row in rows]


def other_images(numbers: np.ndarray) -> dict[int, int]:
    """For each of two or more different images another one: a random cycle, so that none keeps its own."""
    order = numbers[np.argsort(np.random.PCG64(0).random_raw(len(numbers)), kind="stable")]
    return dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))


def _free_memory() -> int | None:
    """Bytes free on the fullest device of all processes, in steps of 1 MiB; None where devices do not tell."""
    limit = device_memory_limit()
    if limit is None or jax.process_count() == 1:
        return limit
    # Every process must come to the same batch.
    return int(multihost_utils.process_allgather(np.int32(limit >> 20)).min()) << 20


@functools.partial(jax.jit, static_argnums=0)
def _token_loss(task, model, batch):
    return task.token_loss(model, batch)
