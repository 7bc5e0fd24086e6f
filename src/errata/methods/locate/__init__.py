"""The parts that locate-then-edit methods share."""
