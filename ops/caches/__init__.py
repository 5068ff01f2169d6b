"""Caches: small classes with plain tensors inside, which stand wherever keys, values, latents or indexer keys are expected."""
