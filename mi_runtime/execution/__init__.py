"""How a step runs on the device: its batch, the recorded or eager forward, sampling and reading
back, and what start-up measures and sizes. It imports `model`, `attention` and `scheduling`; the
engine imports it.
"""
