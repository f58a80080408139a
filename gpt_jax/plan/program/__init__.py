"""A compiled program as numbers: its collectives, cycles and FLOPs, read from its HLO text."""
