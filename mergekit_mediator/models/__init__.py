"""An ordinary transformers model: the room loads it, finds its weights, and turns text into its tokens.

The room knows no expert.
"""
