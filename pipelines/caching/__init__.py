"""Offline prior caching with Ray Data: videos in, priors and encodings as Parquet out."""
