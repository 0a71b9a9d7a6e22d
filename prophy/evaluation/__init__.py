"""How good is it, in numbers and pictures: maps against exact masks, and the report."""
