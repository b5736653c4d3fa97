"""Megatron's indexed format: read, written, merged, verified."""
