"""Measures a pair: `mi-server sweep` and `mi-server calibrate`.

    tasks ─▶ questions ─────────────┐
    grid ─▶ λ × dials × decodings ──┴▶ collect ─▶ samples ─▶ estimates ─▶ curves ─▶ report, profile

All requests go to a server over HTTP, a running one (`--url`) or one that the command starts: a
sweep measures what is served. All λ values share the batches.
"""
