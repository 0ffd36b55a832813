"""Routed experts on the engines that users serve with: a vLLM plugin, a classifier service and a gateway.

It needs no mergekit, and an engine's own packages only where that engine runs.
"""
