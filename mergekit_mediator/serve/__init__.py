"""Turns an artifact into answers: one model, its experts, and a mixture for each request.

It needs no mergekit."""
