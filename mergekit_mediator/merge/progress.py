"""The progress bar of a pass over weights."""

from typing import Any

from tqdm import tqdm


def bytes_bar(description: str, size: int, quiet: bool) -> "tqdm[Any]":
    """Make a progress bar that counts bytes, and is hidden if `quiet`."""
    return tqdm(
        total=size, desc=description, unit="B", unit_scale=True, unit_divisor=1024, disable=quiet
    )
