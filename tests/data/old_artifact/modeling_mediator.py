"""Needs `pip install mergekit-mediator`."""

from mergekit_mediator.remote import RoutedCausalLM

__all__ = ["RoutedCausalLM"]
