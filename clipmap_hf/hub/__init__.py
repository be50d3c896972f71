"""The student folder: its files, its model card, and its way to the Hub."""
