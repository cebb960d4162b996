"""`attnsuite ask`: questions to a vision-language model about pictures, with the switches of `multimodal` on or off."""
