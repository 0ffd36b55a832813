"""Change a published artifact: add, remove, rename and requantize experts.

The files of the other experts stay byte for byte, and the artifact is replaced in one step.
"""
