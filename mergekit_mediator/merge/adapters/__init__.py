"""PEFT adapters: read as models of a merge, and merged into one adapter.

PEFT itself computes what an adapter does to its base, one module at a time where the kind allows it.
"""
