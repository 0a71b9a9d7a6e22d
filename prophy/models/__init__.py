"""The networks: experts, the Physical Branch, and the backbones that carry it. They compute no losses."""
