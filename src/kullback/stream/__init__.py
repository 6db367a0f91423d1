"""Methods that see one item at a time: bandits, change detectors, online learners; in bounded memory."""
