"""Priors: what a vision-language model says of a clip, where it looks meanwhile, and targets made of it."""
