"""The benchmarks on a GPU.

`python -m bench.gpu` measures the engine and `transformers`; `python -m bench.gpu.http_rows`
measures the complete server. The process that starts the others imports no torch: `__main__`,
`supervisor`, `cases`, `bounds`, `report` and `ratios`.
"""
