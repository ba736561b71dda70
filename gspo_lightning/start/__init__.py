"""Before torch is imported: how it was typed, what the package brings along, a terminal."""
