"""From raw corpora to training samples: sources, tokenizers, the indexed format, preprocessing, loading.

The modules are imported one by one (``from steel_megatron.data.preprocessing.pipeline import preprocess``), so that a
worker process that only tokenizes starts without torch.
"""
