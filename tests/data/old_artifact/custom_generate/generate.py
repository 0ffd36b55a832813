"""Needs `pip install mergekit-mediator`."""

from mergekit_mediator.remote import generate

__all__ = ["generate"]
