"""Process groups and the collectives that Soft-MoE needs on them."""
