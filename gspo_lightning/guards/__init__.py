"""What a run does about NaN, short memory and signs of bad health."""
