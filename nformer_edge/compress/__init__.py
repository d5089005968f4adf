"""Smaller and faster models at the same ranking: a recipe's steps, each judged on held-out training people."""
