"""The Soft-MoE language model, as modules for megatron-core's slots."""
