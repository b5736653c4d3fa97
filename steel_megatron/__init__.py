"""steel_megatron: Soft-MoE language models, pretrained with tensor, pipeline, expert and data parallelism."""

__version__ = "0.1.0"
