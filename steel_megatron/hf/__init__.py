"""Hugging Face models: the exported model code, the table of names, conversion."""
