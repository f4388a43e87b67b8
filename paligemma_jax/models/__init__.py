"""The towers: SigLIP's image encoder, Gemma's decoder, and PaliGemma out of both.

Axes, here and in every file of this package:
B batch, T query tokens, S key tokens, P image patches, L layers, D model width, F feed-forward width,
N query heads, K key/value heads, G query heads a key/value head (N = K G), H head width, V vocabulary, r adapter rank.

Numerics: kernels and the inputs of matrix products are in the compute dtype; sums over the residual stream, norms,
softmax and soft caps are in float32 whatever the compute dtype (Gemma's residuals reach 1e4 and more).
"""
