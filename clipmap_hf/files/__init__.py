"""Writes files completely or not at all, formats tables, keeps tensors in files, and compares settings."""
