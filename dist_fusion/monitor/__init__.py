"""What a run shows of itself: events, metrics, TensorBoard and the console."""
