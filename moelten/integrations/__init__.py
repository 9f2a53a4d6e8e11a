"""Thin adapters to other libraries, each imported by name and only when wanted."""
