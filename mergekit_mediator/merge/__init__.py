"""Turn a mergekit configuration into an artifact.

This is the only room that knows how mergekit loads, plans and writes.
"""

# First: the start-up hook imports the plugin as soon as mergekit has its methods. Later, the plugin would be found
# half imported.
import mergekit.merge_methods  # noqa: F401
