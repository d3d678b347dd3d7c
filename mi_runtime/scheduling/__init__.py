"""The policy of the engine in plain Python: it decides what the next step computes.

Here are the KV block pool, sequences, the request queue, the scheduler, the planner, think blocks
and grammars. It imports `config` and `request`. Others import everything but `request_queue` and
`thinking`. Nothing here imports torch or NumPy.
"""
