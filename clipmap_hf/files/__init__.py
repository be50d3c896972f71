"""Files that are whole or absent, settings that differ, and tables."""
