"""Projections and gates that turn the pooled boundary states into the echo vectors of every target module."""
