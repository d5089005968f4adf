"""A backend from outside the package: one folder, and one line in the table."""
