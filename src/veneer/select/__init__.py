"""Choosing a plan: a space of plans, a budget, a search, and the reasons for what is chosen."""
