"""Artifacts on the Hugging Face Hub: the room sends their files there, and fetches files from there.

The room needs no mergekit.
"""
