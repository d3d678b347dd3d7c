"""The HTTP routes, and the process that serves them. A request for an answer is admitted
(`admission`), prepared (`chat`, `completions`), submitted to the engine (`submission`) and answered
(`respond`). It imports `exit_codes`, `config`, `wire`, `text`, `routing`, `engine`, `ops`,
`access`, `answer`, `service` and `mi_runtime.request`. Others import only `uvicorn_server`.
"""
