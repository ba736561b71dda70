"""`python -m gspo_lightning` is `gspo`."""

from gspo_lightning.run.entry import start

if __name__ == "__main__":
    start()
