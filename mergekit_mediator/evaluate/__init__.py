"""Scores artifacts and their rivals on tasks.

Every system is scored by the same function on the same examples."""
