"""Tokenize corpora larger than memory."""
