"""The models: SigLIP's vision tower, Gemma's decoder, PaliGemma, which joins them, and dual encoders (SigLIP, CLIP).

Axes, here and in every file of this package:
B batch, T query tokens, S key tokens, P image patches, L layers, D model width, F feed-forward width,
N query heads, K key/value heads, G = N / K query heads per key/value head, H head width, V vocabulary.

Numerics: kernels and the inputs of matrix products are in the compute dtype; the residual stream, norms, softmax and
soft caps are in float32 whatever the compute dtype (Gemma's residuals exceed 1e4).
"""
