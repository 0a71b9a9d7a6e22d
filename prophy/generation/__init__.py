"""Pipelines: from a prompt to a video, with physics knobs."""
