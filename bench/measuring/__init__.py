"""What all benchmarks share: types of flags, folders, rounds and published results, and the
interception of what torch dispatches.
"""
