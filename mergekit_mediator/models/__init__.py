"""An ordinary transformers model: loading it, finding its weights, and turning text into its tokens.

It knows no expert."""
