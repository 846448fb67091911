"""What the methods compute with: eigenvectors and singular vectors, thresholds of long streams."""
