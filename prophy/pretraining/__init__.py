"""How the parts of the embedded default are trained from nothing."""
