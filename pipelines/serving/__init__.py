"""The HTTP endpoint on Ray Serve: requests in, videos out."""
