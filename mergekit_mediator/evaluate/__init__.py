"""Score artifacts and their rivals on tasks.

The same function scores every system on the same examples.
"""
