"""A pair of checkpoints as one model: its check, loading, the modules that compute with both
endpoints, blended weights and their cache, and the offline merge. It imports `attention`, `kernels`
and `device`.
"""
