"""Train, examine, validate, test or predict with a config: `gspo`, from a checkout.

python train.py fit --config configs/arithmetic.yaml
python train.py --help
"""

from gspo_lightning.run.entry import main, start

__all__ = ["main"]

if __name__ == "__main__":
    start()
