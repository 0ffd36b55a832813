"""Merge methods with prompts: one model at a time is in memory, answers them, and is measured.

`methods` has the formulas; this folder computes the figures that they need.
"""
