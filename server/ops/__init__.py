"""What an operator watches: logs, the log line of each request, metrics and traces. It imports
`routing`, whose decisions it counts, and `mi_runtime.request`. Others import everything here.
"""
