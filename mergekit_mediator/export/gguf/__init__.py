"""GGUF files, which llama.cpp reads: whole models, and LoRA adapters with the model that they are added to.

The folder imports the package `gguf` only when a file is written or its names are asked for.
"""
