"""The stored experts: the form of each weight, the bytes that it may take, and its tuning on prompts.

The passes of a merge call these files; none of them writes an artifact by itself.
"""
