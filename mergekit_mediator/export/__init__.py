"""Turns an artifact's experts into the formats of other tools: adapters, checkpoints, files of engines.

It knows no mergekit and no running model.
"""
