"""`sdo optimize`: steer single images by latent, prompt embedding, guidance or injected noise."""
