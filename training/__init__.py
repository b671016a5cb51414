"""Training data and training programs: procedural worlds, walks through them, action labels, the VAE and the world model."""
