"""What a training step computes: batches, objectives, losses. Knows no engine and no Ray."""
