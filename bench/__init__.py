"""Benchmarks, and what checks the engine on a GPU. bench/README.md describes every command.

Each module here is one command, `python -m bench.NAME`, and so are the packages `gpu` and
`first_contact`. The other packages hold what commands share: `measuring` (flags, folders, published
results), `models` (the models that are measured, and requests to them), `live_server` (a server
process and its streams), and `carried` (what is copied to a GPU machine without network).
"""
