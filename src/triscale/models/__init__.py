"""Image and text towers, and the dual encoder made of them."""
