"""Before torch is imported: how the command was typed, and what the package brings along."""
