"""The linear relatives of attention, for honest comparison: they approximate softmax attention or replace it, where every other room computes it exactly on the pairs kept.

One file per system. They compute in the caller's own framework (NumPy, PyTorch, CuPy, JAX), whose autograd gives their gradients; no kernel room is imported.
"""
