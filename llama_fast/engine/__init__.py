"""Requests to batches to tokens."""
