"""Training: objective, engine, loop, checkpoints."""
