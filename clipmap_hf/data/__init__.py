"""Image–text pairs: where they come from, how they are augmented, and how they become a batch."""
