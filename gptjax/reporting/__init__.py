"""What a run says of itself: its metrics, trackers and profile, its report with advice, and its environment."""
