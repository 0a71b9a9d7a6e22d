"""The product around the method: Ray Data, Ray Train with DeepSpeed, Ray Serve, and the command line."""
