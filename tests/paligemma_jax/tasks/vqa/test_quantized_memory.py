"""What the compiler plans for a LoRA step of a VQA run where weights dwarf activations: batch 1, 16 tokens."""

import math

import jax
import pytest
from flax import nnx

from paligemma_jax.adapt.lora.adapter import attach_lora
from paligemma_jax.adapt.quantization.quantize import quantize
from paligemma_jax.models.gemma import GemmaConfig
from paligemma_jax.models.paligemma import PaliGemma
from tests.paligemma_jax.mini import MINI, task_of
from tests.paligemma_jax.training import planned_memory
from train_jax.core import param_tree

DECODER = GemmaConfig(vocab_size=1792, width=512, depth=8, mlp_dim=2048, num_heads=8, head_dim=64)
CONFIG = MINI.replace(both={"remat": "block"}, decoder={field: getattr(DECODER, field) for field in (
    "width", "depth", "mlp_dim", "num_heads", "head_dim")})  # fmt: skip


def abstract(kind: str | None):
    """Structure and shapes of the model with adapters, its base quantised or plain."""
    graphs = []

    def make():
        model = PaliGemma(CONFIG, rngs=nnx.Rngs(0))
        model = model if kind is None else quantize(model, kind)
        graph, arrays = param_tree.split(attach_lora(model, r"decoder/layers/.*", rngs=nnx.Rngs(0)))
        graphs.append(graph)
        return arrays

    arrays = jax.eval_shape(make)
    return graphs[0], arrays


@pytest.mark.slow
def test_temporary_memory_on_a_quantised_base_is_that_of_plain_lora(mini_options):
    sizes = {"data.prefix_length": 10, "data.suffix_length": 6, "cache_features": False, "model.unroll": False}
    task = task_of(mini_options | sizes)
    models = {kind: abstract(kind) for kind in (None, "nf4", "int8")}
    shapes = models[None][1]
    weights = sum(leaf.size for path, leaf in shapes.items() if "/lora_" not in path)
    assert 30e6 < weights < 50e6
    layer = 4 * sum(math.prod(leaf.shape[1:]) for path, leaf in shapes.items() if path.startswith("decoder/layers/"))
    memory = {kind: planned_memory(task, *models[kind], micro=1, rows=1) for kind in models}
    assert memory[None].argument > 4 * memory["nf4"].argument
    for kind in ("nf4", "int8"):
        assert memory[kind].temp <= 1.3 * memory[None].temp
        assert memory[kind].temp < 2 * layer  # and not eight layers' dequantised weights
