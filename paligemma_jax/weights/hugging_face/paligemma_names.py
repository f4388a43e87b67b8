"""The name table of PaliGemma 1 and 2 as transformers saves them."""

from paligemma_jax.weights.name_table import Row

TOWER = "vision_tower.vision_model."
EMBEDDING = "language_model.model.embed_tokens.weight"
DECODER = "language_model.model.layers.{i}."


def rows(post_norms: bool = False) -> list[Row]:
    """Returns the name table of PaliGemma."""
    table = [
        Row("vision/patch_embedding/kernel", f"{TOWER}embeddings.patch_embedding.weight", "conv"),
        Row("vision/patch_embedding/bias", f"{TOWER}embeddings.patch_embedding.bias"),
        Row("vision/position_embedding", f"{TOWER}embeddings.position_embedding.weight"),
        Row("vision/post_layernorm/scale", f"{TOWER}post_layernorm.weight"),
        Row("vision/post_layernorm/bias", f"{TOWER}post_layernorm.bias"),
        Row("projector/linear/kernel", "multi_modal_projector.linear.weight", "linear"),
        Row("projector/linear/bias", "multi_modal_projector.linear.bias"),
        Row("decoder/embed_tokens/embedding", EMBEDDING),
        Row("decoder/norm/scale", "language_model.model.norm.weight"),
    ]
    table += encoder_rows("vision", TOWER)
    for module, contracted in (
        ("self_attn/q_proj", 1),
        ("self_attn/k_proj", 1),
        ("self_attn/v_proj", 1),
        ("self_attn/o_proj", 2),
        ("mlp/gate_proj", 1),
        ("mlp/up_proj", 1),
        ("mlp/down_proj", 1),
    ):
        name = DECODER + module.replace("/", ".")
        table.append(Row(f"decoder/layers/{module}/kernel", f"{name}.weight", "linear", contracted))
    norms = {"pre_attention_norm": "input_layernorm", "pre_ffw_norm": "post_attention_layernorm"}
    if post_norms:
        norms = {
            "pre_attention_norm": "input_layernorm",
            "post_attention_norm": "post_attention_layernorm",
            "pre_ffw_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        }
    return table + [Row(f"decoder/layers/{a}/scale", f"{DECODER}{b}.weight") for a, b in norms.items()]


def encoder_rows(ours: str, theirs: str) -> list[Row]:
    """Returns the rows of a SigLIP or CLIP encoder's blocks: our tower's path, and the prefix of their names."""
    table = []
    layer = f"{theirs}encoder.layers.{{i}}."
    for norm in ("layer_norm1", "layer_norm2"):
        table += [
            Row(f"{ours}/layers/{norm}/scale", f"{layer}{norm}.weight"),
            Row(f"{ours}/layers/{norm}/bias", f"{layer}{norm}.bias"),
        ]
    for module, contracted in (
        ("self_attn/q_proj", 1),
        ("self_attn/k_proj", 1),
        ("self_attn/v_proj", 1),
        ("self_attn/out_proj", 2),
        ("mlp/fc1", 1),
        ("mlp/fc2", 1),
    ):
        name = layer + module.replace("/", ".")
        table += [
            Row(f"{ours}/layers/{module}/kernel", f"{name}.weight", "linear", contracted),
            Row(f"{ours}/layers/{module}/bias", f"{name}.bias", "flat"),
        ]
    return table
