"""The default taxonomy, for tests that need any."""

from prophy.taxonomy import load_taxonomy

WISA = load_taxonomy("wisa")
PHENOMENA = WISA.names
