"""Turns the engine's token events into an answer. `choice` makes the answer chunks of one choice,
`answer` yields those of all choices of a request, and `sse` or `json_answer` writes them in the
format of their route. It imports `wire`, `text`, `routing`, `engine`, `ops` and
`mi_runtime.request`. Others import everything but `logprobs`.
"""
