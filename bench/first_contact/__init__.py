"""First contact with a GPU: `python -m bench.first_contact` runs every check and measurement on it.

`environment`, `gpu_tests` and `decode_profile` are the processes of its own steps; the other steps
run `bench.gpu`. All other modules but `smallest_kernel` use only the standard library, so they work
whatever is broken on a machine.
"""
