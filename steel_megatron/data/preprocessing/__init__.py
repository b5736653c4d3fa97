"""From documents to indexed corpora."""
