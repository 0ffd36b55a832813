"""The commands: each reads options, calls one function and prints figures.

A command imports slow libraries only when it is called.
"""
