"""Triton kernels for CUDA: pair products and paged attention.

`triton_support` says whether they can run here, and `dispatch` decides which products use them.
`pair_linear` and `paged_attention` import triton, which a CPU installation may lack: import those
two inside a function, once `triton_installed()` is true. Each kernel has a slow twin outside this
package, in `model` or `attention`. It imports no other package of the engine.
"""
