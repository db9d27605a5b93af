"""Projection and gate that turn the pooled boundary state into one echo vector per sample."""
