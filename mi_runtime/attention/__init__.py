"""Attention over paged KV: the plan of a batch, the KV cache, and the attention backends.

`reference` is plain torch: it serves on a CPU, and on CUDA `selector` compares the others with it
and takes the fastest. It imports `errors`, `config` and `kernels`. Others import only `paged`,
`plan`, `reference` and `selector`.
"""
