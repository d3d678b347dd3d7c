"""Decides who may send requests, how many, and how long an answer may take. One middleware checks
API keys and quotas and sets the deadline, before the body is read. It imports `exit_codes`, `wire`,
`engine` and `ops`. Others import everything here.
"""
