"""Merge methods that mergekit registers, one short file each.

They know tensors only.
"""

# First: the start-up hook imports the plugin as soon as mergekit has its methods. Later, the plugin would be found
# half imported.
import mergekit.merge_methods  # noqa: F401
