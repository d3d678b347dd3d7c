"""Runs steps on the device: builds batches, computes forward passes, samples, reads results back.

Here is also what start-up measures, sizes and records before the first step. The package imports
`model`, `attention`, `kernels`, `device` and `scheduling`; only the engine imports it.
"""
