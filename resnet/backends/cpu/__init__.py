"""The CPU: oneDNN and Winograd convolutions, and compiled passes between them."""
