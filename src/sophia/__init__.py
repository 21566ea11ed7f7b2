"""Sophia."""
