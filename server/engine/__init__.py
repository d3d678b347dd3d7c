"""This process's side of the engine process: the client that exchanges messages with it over a
pipe, the open requests of one answer, and the sampling parameters of a request. It imports
`exit_codes`, `wire`, `text`, `mi_runtime.config` and `mi_runtime.request`. Others import everything
but `retry_after` and `watchdog`.
"""
