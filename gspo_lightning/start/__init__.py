"""What is known before torch is imported: how it was typed, what the package brings, a terminal."""
