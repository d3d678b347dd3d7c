"""Chooses λ: the λ that a request names, the measured profile of the pair, and the policy that
turns a budget, an effort or load into a λ. It imports `wire`, and knows neither HTTP nor text.
"""
