"""Integrations with hosts; each module imports its framework, and is imported by name."""
