"""Training with Ray Train and DeepSpeed: a cache in, checkpoints and a trained branch out."""
