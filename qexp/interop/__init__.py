"""The interfaces that model classes of diffusers and transformers expect of an attached quantizer."""
