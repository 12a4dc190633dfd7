"""Linear recurrences with a diagonal-plus-low-rank transition."""
