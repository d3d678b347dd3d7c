"""The HTTP routes and the process that serves them. A handler is read top-down: a request is
admitted (`admission`), prepared (`chat`, `completions`), submitted to the engine (`submission`) and
answered (`respond`). It imports everything but the commands; only `serve` imports it.
"""
