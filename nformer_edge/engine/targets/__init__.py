"""What an engine is built for: targets as recipes, and what this machine and its GPU are."""
