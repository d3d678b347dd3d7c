"""Who may send a request and how much: API keys, quotas and deadlines, checked by one middleware
before the body is read. It imports `ops`, `engine` and `wire`.
"""
