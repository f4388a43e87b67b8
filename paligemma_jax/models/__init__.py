"""The towers: SigLIP's image encoder, Gemma's decoder, and PaliGemma out of both."""
