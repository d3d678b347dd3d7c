"""A real server process for benchmarks over HTTP, and the streams that this process reads from
it.
"""
