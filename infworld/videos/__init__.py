"""People's own films as training data: from video files to latents, poses and actions (docs/own-videos.md)."""
