"""Hugging Face models: the code that travels with exported weights, the table of names, conversion."""
