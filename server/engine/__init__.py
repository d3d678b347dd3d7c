"""The HTTP process's side of the engine: the pipe to its process, the events of each answer, and
the sampling parameters of a request. It imports `wire`, `text` and the engine's messages
(`mi_runtime.request`).
"""
