"""What this machine is, and how megatron-core is made to run on it."""

from steel_megatron.platform.probe import Platform, prepare, probe

__all__ = ["Platform", "prepare", "probe"]
