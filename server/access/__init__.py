"""Who may send requests, how many, and how long an answer may take: API keys, quotas and deadlines,
which one middleware checks before the body is read. It imports `ops`, `engine` and `wire`.
"""
