"""What this machine is, and how megatron-core is made to run on it."""

from steel_megatron.platform.implementation import LOCAL, Implementation, choose_implementation
from steel_megatron.platform.probe import Platform, prepare, probe

__all__ = ["LOCAL", "Implementation", "Platform", "choose_implementation", "prepare", "probe"]
