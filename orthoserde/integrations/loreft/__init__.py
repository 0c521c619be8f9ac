"""LoReFT: low-rank linear interventions on the hidden states of a transformer."""
