"""The part of a weight that an expert keeps: its forms, the bytes of each, and how bytes are divided.

The room knows tensors only.
"""
