"""What chooses λ: the dial a request sets, the measured profile, and the policy that turns a
budget, an effort or load into a λ. It imports `wire`; it knows neither HTTP nor text.
"""
