"""Fits the stored form of an expert to the expert's own answers.

The number of bytes stays.
"""
