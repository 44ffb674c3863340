"""What the stages share and is not a network: one topic a file, each readable alone."""
