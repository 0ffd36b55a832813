"""The commands: options in, one call, figures out.

They import what takes long only when they are called."""
