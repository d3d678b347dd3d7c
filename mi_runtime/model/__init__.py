"""A pair of checkpoints as one model that computes any λ.

`pair_check` checks two checkpoint directories, `load` loads them, `swap` replaces the modules of
the model by `pair_modules`, and `probe` checks the result. `weights` and `delta` store the pair of
matrices that those modules compute with, and `blend_cache` stores blended weights. `row_lambdas`
holds the λ of every row of the running step. `merge_weights` writes a merged checkpoint offline. It
imports `errors`, `config`, `request`, `device`, `kernels` and `attention`. Others import only
`blended_model`, `load`, `pair_check`, `pair_modules`, `row_lambdas` and `weights`.
"""
