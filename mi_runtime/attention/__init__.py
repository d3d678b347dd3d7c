"""Attention over paged KV: the plan of a batch, the reference, and the backends for CUDA, of which
start-up takes the fastest. It imports `kernels`.
"""
