"""The models that benchmarks measure, and the requests to them.

`shapes` has dimensions of real models. `random_pair` makes pairs on a device, `midsize_pair` and
`pair_on_disk` make checkpoint directories. `static_engine` is the engine without blending.
`workloads` has the rounds of requests on the embedded and the mid-size pair.
"""
