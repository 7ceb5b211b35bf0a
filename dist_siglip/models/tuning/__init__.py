"""What of each tower trains, how fast, and by which low-rank updates."""
