"""Attention over paged KV: the plan of a batch, the KV cache, and the attention backends.

`reference` serves on a CPU and checks the backends for CUDA, of which start-up selects the fastest.
The package imports `kernels`, `config` and `errors`.
"""
