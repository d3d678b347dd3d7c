"""Runs steps on the device: builds batches, computes forward passes, samples, reads results back.

At start-up it measures costs, sizes the caches and captures CUDA graphs. It imports `errors`,
`config`, `request`, `scheduling`, `device`, `kernels`, `attention` and `model`. Others import only
`in_flight_step` and `startup`.
"""
