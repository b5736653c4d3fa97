"""Runs as jobs of Slurm: batch scripts from templates, what they do when a step has ended, and how a run is doing."""
