"""Storage of experience: frames, rings, fixed datasets, priorities."""
