"""Merge methods that mergekit registers, one short file each.

They know tensors only.
"""
