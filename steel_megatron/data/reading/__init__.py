"""Readers: from files of any form to documents of text."""
