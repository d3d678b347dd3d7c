"""The policy of the engine in plain Python: it decides what the next step computes.

Here are the KV block pool, sequences, the request queue, the scheduler, the planner, think blocks
and grammars. The package imports no tensor library, and of the engine only `config`, `request` and
`errors`.
"""
