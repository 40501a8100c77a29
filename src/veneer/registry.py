"""The registry: one line a method, its class and the file in methods/ that holds it. Data only, so that it loads at once."""

METHODS = {
    "LoRA": "lora",
    "IA3": "ia3",
    "BitFit": "bitfit",
    "Bottleneck": "bottleneck",
    "Prefix": "prefix",
    "PromptTuning": "prompt",
    "Full": "full",
    "LoHa": "loha",
    "LoKr": "lokr",
    "FourierFT": "fourierft",
    "C3A": "c3a",
    "MiSS": "miss",
    "RoAd": "road",
    "OFT": "oft",
    "BOFT": "boft",
    "HRA": "hra",
    "GraLoRA": "gralora",
    "DeLoRA": "delora",
    "HiRA": "hira",
    "BEFT": "beft",
}
