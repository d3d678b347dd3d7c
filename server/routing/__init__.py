"""Chooses λ. It reads the λ, the budget or the effort that a request names and the measured profile
of the pair, and its policy decides by them and by the load. Nothing here knows HTTP or text. It
imports `exit_codes`, `wire` and `mi_runtime.request`. Others import everything.
"""
