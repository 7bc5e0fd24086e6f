"""What a model's keys look like over ordinary text."""
