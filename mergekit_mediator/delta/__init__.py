"""The part of a weight that an expert keeps: its forms, what each costs, and how bytes are divided.

It knows tensors only."""
