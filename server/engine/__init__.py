"""The HTTP process's side of the engine process: the pipe and its watchdog, the events of one
answer, and the sampling parameters that a request becomes. It imports `wire`.
"""
