"""Compile vision-language models to 4-bit weights, activations and cache with pruned visual tokens."""
