"""Backbone families: shapes, classes, published configurations, and how their inputs are encoded."""
