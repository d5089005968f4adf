"""Galleries past one machine's memory: a vector store gives the nearest images, the head relates these."""
