"""Turn an artifact into answers: one model, its experts, and a mixture for each request.

This room needs no mergekit.
"""
