"""The commands that simulate physics clips and train the embedded default on them."""
