"""Text to image: latents, guidance, LoRA, over diffusers and peft."""
