"""From encoded images to model input, as each checkpoint's family prepares them."""
