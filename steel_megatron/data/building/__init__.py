"""Sets of conversations from published ones: questions, languages, mixtures."""
