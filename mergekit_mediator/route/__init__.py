"""Decides which experts a request needs, how sure that is, and how far the request is from the known.

Routers are fitted and calibrated here, too."""
