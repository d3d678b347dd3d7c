"""Triton kernels for CUDA: pair products and paged attention.

`triton_support` says whether kernels can run here, and `dispatch` decides which products use them.
`pair_linear` and `paged_attention` import triton, which a CPU installation may lack. So import
those two inside a function, once `triton_installed()` is true. `model` and `attention` compute the
same in plain torch, and tests compare the two. It imports no other package. Others import only
`dispatch`, `paged_attention` and `triton_support`.
"""
