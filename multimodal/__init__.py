"""Attention switched on in vision-language models of transformers, and off again."""
