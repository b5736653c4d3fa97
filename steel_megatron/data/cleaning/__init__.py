"""The parts of :mod:`steel_megatron.data.cleaning.pipeline`."""
