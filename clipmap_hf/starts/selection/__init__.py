"""Selection: students that keep some of their teacher's parts, by scores, as one-hot operators for the same mapper."""
