"""Answers questions in batches, in memory that does not grow with their number.

The array of logits of all tokens over the vocabulary (257,152 tokens) is never made: answers are generated with a KV
cache, likelihoods and losses are computed in chunks, and only token ids and sums are kept of each batch. The first
batch has the size that the config allows, or a smaller one for which the device has memory according to the compiler;
it is halved whenever the device still runs out of memory.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Bool, Int
from ml_collections import ConfigDict

from paligemma_jax.adapt.quantization.quantize import set_outlier_split
from paligemma_jax.data.prompts import encode
from paligemma_jax.data.records import RecordSource
from paligemma_jax.data.sources.question_families import question_family
from paligemma_jax.data.synthetic_clevr.attributes import ANSWERS
from paligemma_jax.generation.candidate_scoring import score_candidates
from paligemma_jax.generation.generate import generate
from paligemma_jax.metrics.text import Accuracy
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.tasks import common
from paligemma_jax.tasks.vqa.answer_record import Answer, TokenLoss, question_of
from paligemma_jax.tasks.vqa.features import QuestionReader, encode_images, encoder, feature_shape
from paligemma_jax.tasks.vqa.rows import RowProcessor
from train_jax.core import param_tree
from train_jax.core.errors import UserError
from train_jax.parallel import sharding
from train_jax.system.memory import device_memory_limit, least_of_processes, smaller_batch, step_memory

OUTPUTS = ("generate", "likelihood", "loss")
TokenLossFunction = Callable[[PaliGemma, Mapping[str, jax.Array]], tuple[jax.Array, jax.Array]]


def candidate_answers(candidates: str) -> tuple[str, ...]:
    """Returns the candidate answers of config.eval.candidates: CLEVR's for "clevr", else those between the bars."""
    return ANSWERS if candidates == "clevr" else tuple(filter(None, candidates.split("|")))


def initial_batch_size(config: ConfigDict, mesh: Mesh) -> int:
    """Returns `eval.batch_size`, rounded to a multiple of the parts into which the mesh splits rows."""
    parts = sharding.row_divisor(mesh.shape)
    return max(config.eval.batch_size // parts, 1) * parts


class BatchMemory:
    """The bytes that compiled batches need; evaluations that share it compile each batch for them once."""

    def __init__(self) -> None:
        self._bytes: dict[tuple, int | None] = {}

    def get(self, key: tuple, compile_batch: Callable[[], jax.stages.Compiled]) -> int | None:
        """Returns the bytes of the batch of a key beside the model; None if the compiler does not say."""
        if key not in self._bytes:
            memory = step_memory(compile_batch())
            self._bytes[key] = None if memory is None else memory.temp + memory.output
        return self._bytes[key]


class VQAEvaluation:
    """Answers the questions of any number of sources with one model."""

    def __init__(
        self,
        model: PaliGemma,
        config: ConfigDict,
        mesh: Mesh,
        processor: RowProcessor,
        token_loss: TokenLossFunction,
        batch_memory: BatchMemory | None = None,
    ):
        """Tokenizes the candidate answers; nothing is computed yet.

        Args:
          model: on the mesh.
          config: of the run; `eval`, `loss` and `data` are read.
          mesh: of devices.
          processor: prepares the records.
          token_loss: see VQA.token_loss, compiled.
          batch_memory: of a run, whose evaluations share it; None: of this evaluation.
        """
        self.config, self.mesh, self.processor = config, mesh, processor
        self.model = model
        if config.eval.int8_outliers is not None:
            # The clone shares the arrays, and training continues with dequantised weights.
            self.model = nnx.clone(model)
            set_outlier_split(self.model, config.eval.int8_outliers)
        self._token_loss, self._batch_memory = token_loss, batch_memory or BatchMemory()
        self._parts = sharding.row_divisor(mesh.shape)
        self._limit = initial_batch_size(config, mesh)  # no batch is larger; lowered where the device has less memory
        self._fitted = 0  # the largest batch known to fit
        self._candidates = self._tokenize_candidates()

    def replace(self, model: PaliGemma | None = None, processor: RowProcessor | None = None) -> "VQAEvaluation":
        """Returns the same evaluation with another model or another processor."""
        model = self.model if model is None else model
        processor = self.processor if processor is None else processor
        return VQAEvaluation(model, self.config, self.mesh, processor, self._token_loss, self._batch_memory)

    def summary(self, source: RecordSource) -> dict[str, float]:
        """Returns accuracy and token loss on a source, for validation during training."""
        accuracy, loss = Accuracy(), TokenLoss()
        for answer in self.answers(source, ("generate", "loss")):
            accuracy.add(answer.correct)
            loss.add(answer)
        return {"accuracy": accuracy.overall, "loss": loss.mean, "examples": accuracy.examples}

    def answers(self, source: RecordSource, outputs: tuple[str, ...], shuffled: bool = False) -> Iterator[Answer]:
        """Yields the answers to the good rows of a source, in order.

        Args:
          source: the records; bad rows are left out, as the config's policy says.
          outputs: what to compute, of OUTPUTS.
          shuffled: show each question the image of another scene (the same one for all questions of an image).

        Raises:
          UserError: too many bad rows, no good row, or a device too small for a single question.
        """
        start, good = 0, 0
        size = min(self._limit, -(-len(source) // self._parts) * self._parts)  # a split may be smaller than a batch
        encode, cache_bytes = encoder(self.model, self.mesh), self._cache_bytes()
        with QuestionReader(self.processor, source, encode, size, cache_bytes, shuffled) as reader:
            size = self._fit(reader, size, outputs)
            reader.resize(size)
            while start < len(source):
                rows = range(start, min(start + size, len(source)))
                try:
                    answers = self._batch(reader, rows, size, outputs)
                except jax.errors.JaxRuntimeError as error:
                    self._limit = size = self._shrink(error, size)
                    reader.resize(size)
                    continue
                start, good = start + len(rows), good + len(answers)
                yield from answers
            reader.check()
        if not good:
            raise UserError(f"none of the {len(source)} rows to evaluate can be used: correct the data.")

    def _cache_bytes(self) -> int:
        """Returns the bytes of image features to keep; none where several processes share the images of a batch."""
        return self.config.eval.feature_cache_mb << 20 if jax.process_count() == 1 else 0

    def _batch(self, reader: QuestionReader, rows: range, size: int, outputs: tuple[str, ...]) -> list[Answer]:
        """Reads and computes one batch, and returns the answers to its good rows."""
        records, arrays = reader.read(rows, size)
        out = self._compute(arrays, outputs)
        answers = []
        for i, record in enumerate(records):
            if arrays["weight"][i] == 0:
                continue
            question = question_of(record.prefix, self.config.data.prompt)
            values: dict[str, Any] = {"image_index": record.image_index}
            if "generate" in out:
                tokenizer, ids = self.processor.tokenizer, out["generate"][i].tolist()
                values |= {"prediction": tokenizer.decode(ids), "ended": tokenizer.eos_id in ids}
            if "likelihood" in out:
                values["likeliest"] = self._candidates.texts[int(out["likelihood"][i].argmax())]
            if "loss" in out:
                values |= {"nll": float(out["loss"][0][i]), "tokens": float(out["loss"][1][i])}
            answers.append(Answer(record.image_name, question, question_family(question), record.suffix, **values))
        return answers

    def _compute(self, arrays: dict[str, np.ndarray], outputs: tuple[str, ...]) -> dict[str, Any]:
        """Runs the programs of one batch; returns their results on the host."""
        batch = common.to_mesh(arrays, self.mesh)
        out = {name: program(self.model, batch) for name, program in self.programs(outputs).items()}
        return jax.tree.map(sharding.to_host, out)

    def programs(self, outputs: tuple[str, ...] = OUTPUTS) -> dict[str, Callable]:
        """Returns functions of the model and a batch on the mesh by output; no likelihood without candidates."""
        programs: dict[str, Callable] = {"generate": self._generate, "loss": self._token_loss}
        if self._candidates.texts:
            programs["likelihood"] = self._score
        return {name: programs[name] for name in OUTPUTS if name in outputs and name in programs}

    def _generate(self, model: PaliGemma, batch: Mapping[str, jax.Array]) -> jax.Array:
        tokens = generate(
            model,
            None,
            batch["prompt"],
            batch["prompt_mask"],
            self.config.eval.max_new_tokens,
            self.processor.tokenizer.eos_id,
            image_features=batch["features"],
        )
        assert isinstance(tokens, jax.Array)  # without return_out
        return tokens

    def _score(self, model: PaliGemma, batch: Mapping[str, jax.Array]) -> jax.Array:
        prompt, mask = batch["prompt"], batch["prompt_mask"]
        chunks = self.config.loss.chunk_size, self.config.loss.vocab_chunk
        return score_candidates(
            model, batch["features"], prompt, mask, self._candidates.ids, self._candidates.mask, *chunks
        )

    # Memory.

    def _fit(self, reader: QuestionReader, size: int, outputs: tuple[str, ...]) -> int:
        """Halves a batch size until the compiled batch fits into the free memory, where devices report that."""
        limit = least_of_processes(device_memory_limit())
        while limit is not None and size > max(self._fitted, self._parts):
            if self._all_activations(size) <= limit:  # saves a compilation, which takes half a minute on a CPU
                break
            needed = self._batch_needs(*self._shapes(reader, size), outputs)
            if needed is None or needed <= limit:
                break
            need = needed
            while need > limit and size > self._parts:  # memory is about proportional to the rows; compiled again
                size, need = max(size // 2 // self._parts, 1) * self._parts, need // 2
            self._limit = size
            logging.warning(
                "Evaluation continues with batches of %d questions: more need %d bytes beside the model, %d are free.",
                size, needed, limit,
            )  # fmt: skip
        self._fitted = max(self._fitted, size)
        return size

    def _batch_needs(self, batch, images, outputs: tuple[str, ...]) -> int | None:
        """Returns the bytes that a batch of these shapes needs beside the model; None if the compiler does not say."""

        def compile_batch() -> jax.stages.Compiled:
            return jax.jit(self._everything, static_argnums=3).lower(self.model, batch, images, outputs).compile()

        key = outputs, str((batch, images)), str(param_tree.abstract(self.model))
        return self._batch_memory.get(key, compile_batch)

    def _all_activations(self, size: int) -> int:
        """Returns an upper bound of the bytes of a batch on a device: all activations of all layers, in float32."""
        config, data, model = self.config, self.processor.data, self.model.config
        vision, decoder = model.vision, model.decoder
        tokens = data.prefix_length + max(data.suffix_length, config.eval.max_new_tokens, self._candidates.ids.size)

        def layers(tower, length, projected) -> int:  # residual stream, projections, scores, feed-forward
            wide = 8 * tower.width + 4 * projected + 4 * tower.mlp_dim
            return tower.depth * length * (wide + 3 * tower.num_heads * length)

        row = layers(vision, vision.num_patches, vision.width)
        row += layers(decoder, vision.num_patches + tokens, decoder.num_heads * decoder.head_dim)
        row += 4 * decoder.vocab_size + 4 * tokens * decoder.width + 6 * vision.image_size**2
        logits = 4 * config.loss.chunk_size * decoder.vocab_size
        return 4 * (size // self._parts * row + logits)

    def _shapes(self, reader: QuestionReader, size: int):
        """Returns the shapes of a batch on the mesh and of its images."""
        rows = sharding.batch_sharding(self.mesh, accumulate=False)

        def shape(row: np.ndarray | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((size, *row.shape), row.dtype, sharding=rows)

        example = reader.blank()
        images = shape(example.pop("image"))
        features = jax.ShapeDtypeStruct(feature_shape(self.model), np.float32)
        return {name: shape(row) for name, row in example.items()} | {"features": shape(features)}, images

    def _everything(self, model, batch, images, outputs: tuple[str, ...]):
        """Computes all outputs of a batch in one program, for the compiler's memory analysis."""
        return [encode_images(model, images), *(run(model, batch) for run in self.programs(outputs).values())]

    def _shrink(self, error: Exception, size: int) -> int:
        """Returns half the batch size after the device ran out of memory; raises as `smaller_batch`."""
        remedy = "use a device with more, lower data.prefix_length or eval.max_new_tokens, or a smaller compute_dtype"
        size = smaller_batch(error, size, self._parts, "eval.batch_size", remedy)
        logging.warning("Evaluation continues with batches of %d questions: the device ran out of memory.", size)
        return size

    def _tokenize_candidates(self) -> "_Candidates":
        tokenizer, texts = self.processor.tokenizer, candidate_answers(self.config.eval.candidates)
        special = self.config.data.special_tokens
        rows = [[*encode(tokenizer, text, special), tokenizer.eos_id] for text in texts]
        lengths = np.array([len(row) for row in rows], int)
        ids = np.full((len(rows), lengths.max(initial=0)), tokenizer.pad_id, np.int32)
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens)] = tokens
        mask = np.arange(ids.shape[1])[None] < lengths[:, None]
        return _Candidates(texts, jnp.asarray(ids), jnp.asarray(mask))


class _Candidates(NamedTuple):
    """Candidate answers, each with its EOS; C and M are 0 without candidates."""

    texts: tuple[str, ...]
    ids: Int[jax.Array, "C M"]
    mask: Bool[jax.Array, "C M"]
