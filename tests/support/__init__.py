"""What several test files need: small models and runs, stand-ins, faults, scripts of ranks."""
