"""What runs in the next step, in plain Python: KV blocks, sequences, the scheduler, the planner,
think blocks and grammars. It imports no tensors, and nothing of the engine but `config`, `request`
and `errors`.
"""
