"""Closed-form heads: pure functions of class statistics."""
