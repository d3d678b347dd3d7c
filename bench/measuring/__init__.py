"""What all benchmarks share.

`arguments` parses flags, `folders` has paths, `publishing` runs rounds in turn and writes results,
`device` waits for a device, and `dispatches` intercepts the operators that torch dispatches.
"""
