"""Programs that other projects load us through: transformers."""
