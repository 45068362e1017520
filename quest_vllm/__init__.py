"""Query-aware sparse attention (Quest) at decode, as a vLLM plugin. Importing it has no side effect."""

__version__ = "0.1.0"
