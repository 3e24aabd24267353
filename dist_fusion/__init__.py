"""Fast vision-language dual encoders, distilled from a fusion encoder on many GPUs."""
