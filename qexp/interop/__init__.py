"""What the model classes of diffusers and transformers expect of a quantizer that is attached to them."""
