"""Turn a mergekit configuration into an artifact.

This is the only room that knows how mergekit loads, plans and writes.
"""
