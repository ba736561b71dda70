"""One command: its settings, its folder, its checks, what it says, and how it ends."""
