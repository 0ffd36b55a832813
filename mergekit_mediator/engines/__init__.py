"""Routed experts on serving engines: a vLLM plugin, a classifier service and a gateway.

The room needs no mergekit, and imports an engine's own packages only where that engine runs.
"""
