"""The delta rule: a linear recurrence whose write erases the old value."""
