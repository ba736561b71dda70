"""GSPO on PyTorch Lightning."""
