"""Routing modes of a Soft-MoE layer, and what they share."""
