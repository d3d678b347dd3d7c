"""Measures a pair: `mi-server sweep` and `mi-server calibrate`.

    tasks ─▶ questions ─────────────┐
    grid ─▶ λ × groups × decodings ─┴▶ collect ─▶ samples ─▶ estimates ─▶ curves ─▶ report, profile

All requests go to a server over HTTP, either a running one (`--url`) or one that the command
starts, so that what is measured is what is served. All λ values share the batches.

It imports `exit_codes`, `routing`, `serve` and `mi_runtime.embedded_pair`. Others import only
`commands`.
"""
