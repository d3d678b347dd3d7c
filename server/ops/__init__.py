"""What an operator watches: logs, the line of each request, metrics and traces. It imports
`routing`, whose decisions it counts.
"""
