"""Turn a mergekit configuration into an artifact, and change what artifacts hold.

This is the only room that knows how mergekit loads, plans and writes.
"""

from importlib.util import find_spec

# First: the start-up hook imports the plugin as soon as mergekit has its methods. Later, the plugin would be found
# half imported. Stored experts are removed, renamed and requantized without mergekit.
if find_spec("mergekit") is not None:
    import mergekit.merge_methods  # noqa: F401
