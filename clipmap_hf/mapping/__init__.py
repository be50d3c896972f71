"""The mapping: operators per axis and depth, and the mapper that applies them to a teacher."""
