"""An artifact on disk: manifest, expert files, router files, and how they are published.

The room knows no model and no mergekit.
"""
