"""Where examples come from, and how images and text become arrays."""
