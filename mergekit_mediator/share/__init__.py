"""Artifacts on the Hugging Face Hub: what is sent there, and what is fetched from there.

It needs no mergekit.
"""
