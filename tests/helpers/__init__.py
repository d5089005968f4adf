"""What several test modules share: made machines, planted faults, small models and data."""
