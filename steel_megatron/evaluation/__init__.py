"""What a model is worth: benchmarks through lm-eval's harness, and overlap of benchmarks with training corpora."""
