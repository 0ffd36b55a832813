"""Routers: which experts a request needs, how sure the router is, and how far the request is from the known.

The room also fits and calibrates routers.
"""
