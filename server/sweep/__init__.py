"""Measuring a pair: `mi-server sweep` and `mi-server calibrate`.

    tasks ─▶ questions ─┐
    settings ─▶ λ × dials × decoding ─┴▶ asking ─▶ samples ─▶ estimates ─▶ curves ─▶ report, profile

Everything is asked of a server over HTTP, one that runs already (`--url`) or one that the command
starts for itself: a sweep measures what is served. All λ values share the batches.
"""
