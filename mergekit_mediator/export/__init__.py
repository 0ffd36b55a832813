"""An artifact's experts in the formats of other tools: adapters, patches of weights, and engines' start commands.

The room knows no mergekit and no running model.
"""
