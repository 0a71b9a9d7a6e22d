"""Making videos: what one is asked to be, how it is sampled, and offline batches of them."""
