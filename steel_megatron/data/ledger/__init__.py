"""Which corpora a run reads, in which order, and how far it has read."""
