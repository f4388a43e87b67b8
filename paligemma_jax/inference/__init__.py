"""From files to answers: prompts about images, zero-shot classes, attributes."""
